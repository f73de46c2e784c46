"""Conditioning data sets: configuration, pairs of files, and what reaches the training step."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache import LatentStore
from library.data.dataset import BadImage, TrainImages
from library.data.debug_sheet import write_debug_sheets
from library.data.plan import plan_epoch
from library.data.records import (
    Augmentation,
    Batch,
    BucketRules,
    CaptionClock,
    DatasetKind,
    DatasetSpec,
    ResolvedDataset,
    SubsetSpec,
)
from library.data.report import describe
from library.data.sources import resolve
from library.data.spec import load_dataset_specs
from library.log import UserError
from library.options import DataOptions
from library.training.caching import cache_latents
from library.training.fingerprint import data_facts
from tests.data_fixtures import AveragingVae, picture, write_picture

CONTROL = frozenset({DatasetKind.CONTROL})
CLOCK = CaptionClock(epoch=1, step=0, max_train_steps=10)
SMALL = """\
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "a"
"""


def load(folder: Path, text: str, kinds: frozenset[DatasetKind] = CONTROL) -> tuple[DatasetSpec, ...]:
    path = folder / "d.toml"
    path.write_text(text, encoding="utf-8")
    return load_dataset_specs(DataOptions(dataset_config=path), kinds)


def complaint(folder: Path, text: str, kinds: frozenset[DatasetKind] = CONTROL) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, kinds)
    return str(caught.value)


# ---- configuration


def test_the_key_makes_the_kind(tmp_path: Path) -> None:
    text = SMALL + 'conditioning_data_dir = "c"\n[general]\nclass_tokens = "cat"\ncaption_extension = "txt"\n'
    (spec,) = load(tmp_path, text)
    assert spec.kind is DatasetKind.CONTROL
    (subset,) = spec.subsets
    assert (subset.image_dir, subset.conditioning_data_dir, subset.caption_extension) == ("a", "c", ".txt")
    assert subset.class_tokens is None  # of other kinds of data sets in the same file


def test_what_is_missing_or_does_not_belong_here(tmp_path: Path) -> None:
    assert complaint(tmp_path, SMALL) == f"{tmp_path}/d.toml line 3: datasets[0].subsets[0] " + (
        "conditioning_data_dir is missing"
    )
    paired = SMALL + 'conditioning_data_dir = "c"\n'
    assert "is_reg has no meaning in a controlnet data set" in complaint(tmp_path, paired + "is_reg = true\n")
    assert "metadata_file has no meaning" in complaint(tmp_path, paired + 'metadata_file = "m.json"\n')
    assert "line 2: general.conditioning_data_dir does not belong here" in complaint(
        tmp_path, f'[general]\nconditioning_data_dir = "c"\n{paired}'
    )


def test_other_scripts_refuse_it_in_one_line(tmp_path: Path) -> None:
    others = frozenset({DatasetKind.DREAMBOOTH, DatasetKind.FINETUNE})
    text = SMALL + 'conditioning_data_dir = "c"\n[[datasets.subsets]]\nimage_dir = "b"\n'
    line = "line 5: datasets[0].subsets[0].conditioning_data_dir ControlNet data sets are not for this script"
    line += "; for masks add --masked_loss"
    assert complaint(tmp_path, text, others) == f"{tmp_path}/d.toml {line}"
    mixed = complaint(tmp_path, text, frozenset(DatasetKind))
    assert "some have conditioning_data_dir and some have not" in mixed


def test_the_command_line_names_the_two_folders() -> None:
    options = DataOptions(train_data_dir="t", resolution=(64, 64), dataset_repeats=3)
    (spec,) = load_dataset_specs(options, CONTROL, "c")
    (subset,) = spec.subsets
    assert (subset.image_dir, subset.conditioning_data_dir, subset.num_repeats) == ("t", "c", 3)


# ---- pairs


def subset_of(folder: Path, augmentation: Augmentation | None = None) -> SubsetSpec:
    return SubsetSpec(
        image_dir=str(folder / "images"),
        conditioning_data_dir=str(folder / "edges"),
        augmentation=augmentation or Augmentation(),
    )


def resolved(folder: Path, augmentation: Augmentation | None = None, **choices: Any) -> ResolvedDataset:
    rules = BucketRules((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)
    spec = DatasetSpec(DatasetKind.CONTROL, 2, rules, (subset_of(folder, augmentation),))
    return resolve([spec], allow_captionless=True, **choices)[0]


def test_pairs_share_their_stem(tmp_path: Path) -> None:
    for name in ("images/b.png", "images/a.jpg", "images/c.x.webp", "edges/a.png", "edges/b.png", "edges/c.x.bmp"):
        write_picture(tmp_path / name, (64, 64))
    data = resolved(tmp_path)
    pairs = {Path(r.path).name: Path(str(r.conditioning_path)).name for r in data.records}
    assert pairs == {"a.jpg": "a.png", "b.png": "b.png", "c.x.webp": "c.x.bmp"}
    assert "after pictures of" in "\n".join(describe([data])[0].lines())


def test_the_full_name_decides_between_several(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/a.jpg", "edges/a.png", "edges/a.jpg"):
        write_picture(tmp_path / name, (64, 64))
    pairs = [(Path(r.path).name, Path(str(r.conditioning_path)).name) for r in resolved(tmp_path).records]
    assert sorted(pairs) == [("a.jpg", "a.jpg"), ("a.png", "a.png")]


def test_all_that_have_no_pair_are_named_at_once(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/b.png", "images/c.png", "images/d.png", "edges/c.jpg", "edges/c.webp"):
        write_picture(tmp_path / name, (64, 64))
    (tmp_path / "edges" / "b.png").write_bytes(b"no picture")
    write_picture(tmp_path / "edges" / "d.png", (64, 64))
    with pytest.raises(UserError) as caught:
        resolved(tmp_path)
    lines = str(caught.value).split("\n")
    assert lines.pop() == "--on_bad_image skip leaves out images that lack their picture"
    assert len(lines) == 3
    assert "images/a.png: has no conditioning picture; there is no a.* in" in lines[0]
    assert f"its conditioning picture {tmp_path}/edges/b.png: " in lines[1]
    assert "several conditioning pictures have its name (c.jpg, c.webp in" in lines[2]
    data = resolved(tmp_path, on_bad_image="skip")
    assert [Path(record.path).name for record in data.records] == ["d.png"]
    assert len(data.problems) == 3


def test_folders_that_cannot_be_meant(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", (64, 64))
    with pytest.raises(UserError, match="edges: the folder cannot be read"):
        resolved(tmp_path)
    (tmp_path / "edges").symlink_to(tmp_path / "images")
    with pytest.raises(UserError, match=r"edges: the folder of conditioning pictures \(.*\) is that of the images"):
        resolved(tmp_path)


def test_strangers_and_other_shapes_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, size in (("images/a.png", (64, 48)), ("edges/a.png", (64, 64)), ("edges/z.png", (64, 64))):
        write_picture(tmp_path / name, size)
    with caplog.at_level(logging.WARNING):
        resolved(tmp_path)
    assert "1 pictures of" in caplog.text
    assert "belong to no image: z.png" in caplog.text
    assert "are stretched to their images: a.png" in caplog.text


def test_a_resumed_run_must_have_the_same_pairs(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", (64, 64))
    write_picture(tmp_path / "edges" / "a.png", (64, 64))
    before = data_facts([resolved(tmp_path)])
    (tmp_path / "edges" / "a.png").rename(tmp_path / "edges" / "a.jpg")
    after = data_facts([resolved(tmp_path)])
    assert [name for name in before if before[name] != after[name]] == ["data set 1 conditioning pictures"]


# ---- batches


def write_pairs(folder: Path, scale: float = 1.0) -> None:
    """Images, and the negatives of the same pictures at another size: what was done to one shows in the other."""
    for index, (width, height) in enumerate([(96, 64), (64, 96), (80, 80), (100, 60)]):
        write_picture(folder / "images" / f"{index}.png", (width, height), index)
        (folder / "edges").mkdir(exist_ok=True)
        negative = Image.fromarray(255 - picture((width, height), index))
        size = (round(width * scale), round(height * scale))
        negative.resize(size, Image.Resampling.BICUBIC).save(folder / "edges" / f"{index}.png")


def batches_of(images: TrainImages, epochs: int = 3) -> list[Batch]:
    return [
        images.load(micro, 0, 1, CaptionClock(epoch=epoch, step=0, max_train_steps=10))
        for epoch in range(1, epochs + 1)
        for step in plan_epoch(images.datasets, 5, epoch, 1, 1)
        for micro in step.micro_batches
    ]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_pixels_of_a_pair_stay_together(scale: float, tmp_path: Path) -> None:
    """Mirrored and cropped by the same draw, also where the conditioning picture has another size."""
    write_pairs(tmp_path, scale)
    data = resolved(tmp_path, Augmentation(flip_aug=True, random_crop=True))
    batches = batches_of(TrainImages([data], None, 5))
    flips = [flipped for batch in batches for flipped in batch.flipped]
    assert len(set(flips)) == 2
    assert len({fit.bucket for fit in data.fits}) > 1
    for batch in batches:
        assert batch.images_BCHW is not None
        assert batch.conditioning_images_BCHW is not None
        assert batch.conditioning_images_BCHW.shape == batch.images_BCHW.shape
        # 0 everywhere if the two fit; of a pair that does not, the mean is about 0.6
        apart = (batch.images_BCHW + batch.conditioning_images_BCHW).abs().mean(dim=(1, 2, 3))
        assert float(apart.max()) < (0.03 if scale == 1 else 0.12)


def test_colours_of_the_conditioning_picture_stay(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    plain = batches_of(TrainImages([resolved(tmp_path)], None, 5))
    coloured = batches_of(TrainImages([resolved(tmp_path, Augmentation(color_aug=True))], None, 5))
    pairs = list(zip(plain, coloured, strict=True))
    assert any(not torch.equal(a.images_BCHW, b.images_BCHW) for a, b in pairs)  # type: ignore[arg-type]
    for a, b in pairs:
        assert torch.equal(a.conditioning_images_BCHW, b.conditioning_images_BCHW)  # type: ignore[arg-type]


@pytest.mark.parametrize("to_disk", [False, True])
def test_with_cached_latents_the_pair_is_the_same(to_disk: bool, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    data = resolved(tmp_path, Augmentation(flip_aug=True))
    without = batches_of(TrainImages([data], None, 5))
    store = LatentStore("sdxl", "vae", to_disk=to_disk)
    (cached,), _ = cache_latents(
        [data], AveragingVae(), store, vae_batch_size=2, device=torch.device("cpu"), dtype=torch.float32
    )
    images = TrainImages([cached], store, 5)
    assert images.gives_latents(0)
    assert not images.in_memory(0)  # the pictures are read ahead by the loader's threads
    for plain, batch in zip(without, batches_of(images), strict=True):
        assert batch.images_BCHW is None
        assert torch.equal(plain.conditioning_images_BCHW, batch.conditioning_images_BCHW)  # type: ignore[arg-type]


def test_a_picture_that_breaks_meanwhile_is_named(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    data = resolved(tmp_path)
    (tmp_path / "edges" / "2.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"edges/2\.png: the file is empty"):
        batches_of(TrainImages([data], None, 5))
    batches = batches_of(TrainImages([data], None, 5, on_bad_image="skip"), epochs=1)
    assert 0.0 in [weight for batch in batches for weight in batch.loss_weights_B.tolist()]


def test_the_debug_sheet_shows_both(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    images = TrainImages([resolved(tmp_path)], None, 5)
    sheets = write_debug_sheets(images, plan_epoch(images.datasets, 5, 1, 1, 1), tmp_path / "out", CLOCK)
    with Image.open(next(path for path in sheets if "64x64" in path.name)) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    left, right = pixels[8:72, 8:72], pixels[8:72, 72:136]
    assert abs(left + right - 255).mean() < 4


def test_images_of_one_name_from_several_folders_do_not_share_a_mask(tmp_path: Path) -> None:
    """Keys that are paths need no image_dir; without it nothing tells in which subfolder the mask of each lies."""
    names = ("one/a.png", "two/a.png", "one/b.png")
    for name in names:
        write_picture(tmp_path / name, (64, 64))
        write_picture(tmp_path / "masks" / Path(name).name, (64, 64))
    rows = ", ".join(f'"{tmp_path / name}": {{"caption": "c"}}' for name in names)
    (tmp_path / "m.json").write_text(f"{{{rows}}}")
    subset = SubsetSpec(metadata_file=str(tmp_path / "m.json"), mask_dir=str(tmp_path / "masks"))
    spec = DatasetSpec(DatasetKind.FINETUNE, 4, BucketRules((64, 64)), (subset,))
    with pytest.raises(UserError) as caught:
        resolve([spec])
    lines = str(caught.value).split("\n")[:-1]
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / name) for name in names[:2]]
    assert all("none has a mask of its own; set image_dir" in line for line in lines)
    (left,) = resolve([spec], on_bad_image="skip")
    assert [record.path for record in left.records] == [str(tmp_path / "one" / "b.png")]
    subset = replace(subset, image_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"masks/one: the folder cannot be read"):  # the place that is missing
        resolve([replace(spec, subsets=(subset,))])
