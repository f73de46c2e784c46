"""Masks of the loss: found with their images, cut as they were, and nothing else counts."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.cache import LatentStore, target_of
from library.data.cache_files import latent_shape
from library.data.dataset import BadImage, TrainImages
from library.data.debug_sheet import write_debug_sheets
from library.data.images import Cut
from library.data.masks import Masks, cell_weights
from library.data.plan import plan_epoch
from library.data.records import (
    Augmentation,
    Batch,
    BucketRules,
    CaptionClock,
    DatasetKind,
    DatasetSpec,
    ImageRecord,
    MicroBatch,
    Sample,
    SubsetSpec,
)
from library.data.report import describe
from library.data.sources import resolve
from library.data.spec import load_dataset_specs
from library.diffusion.objective import Objective
from library.diffusion.schedule import make_schedule
from library.log import UserError
from library.options import DataOptions, LossOptions, NoiseOptions, ValidationOptions
from library.training.caching import cache_latents
from library.training.fingerprint import data_facts
from library.training.held_out import hold_out
from tests.data_fixtures import AveragingVae, picture, write_picture
from tests.house.source_map import ROOT
from tests.masks_fixtures import RULES, resolved, subset_with, write_mask, write_masked, write_transparent

SIZES = [(96, 64), (64, 96), (80, 80), (100, 60), (64, 96)]
CLOCK = CaptionClock(epoch=1, step=0, max_train_steps=10)


def batches_of(images: TrainImages, epochs: int = 2) -> list[Batch]:
    return [
        images.load(micro, 0, 1, CaptionClock(epoch=epoch, step=0, max_train_steps=10))
        for epoch in range(1, epochs + 1)
        for step in plan_epoch(images.datasets, 5, epoch, 1, 1)
        for micro in step.micro_batches
    ]


def cells_of_red(batch: Batch) -> torch.Tensor:
    """Mean brightness 0..1 of the red channel over the pixels of each latent."""
    assert batch.images_BCHW is not None
    _, rows, columns = latent_shape((batch.images_BCHW.shape[3], batch.images_BCHW.shape[2]))
    red_BHW = batch.images_BCHW[:, 0, : rows * 8, : columns * 8] / 2 + 0.5
    return red_BHW.reshape(-1, rows, 8, columns, 8).mean(dim=(2, 4))


def masks_of(batch: Batch) -> torch.Tensor:
    assert batch.loss_masks_BHW is not None
    return batch.loss_masks_BHW


# ---- the weights


def test_a_weight_is_the_mean_of_its_pixels() -> None:
    mask = np.zeros((20, 27), np.uint8)
    mask[:8, 8:16] = 255
    mask[8:16, :4] = 255
    mask[16:] = mask[:, 24:] = 255  # belong to no latent
    found = cell_weights(mask, Cut((27, 20), (0, 0), (27, 20)))
    assert found.tolist() == [[0, 255, 0], [128, 0, 0]]


def test_the_red_channel_counts_and_transparency_is_black(tmp_path: Path) -> None:
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, :8] = (255, 0, 0)
    colours[:, 8:] = (0, 255, 255)
    Image.fromarray(colours).save(tmp_path / "colour.png")
    write_transparent(tmp_path / "brush.png", np.full((16, 16, 3), 255), np.repeat([[255] * 8 + [0] * 8], 16, axis=0))
    write_mask(tmp_path / "grey.png", np.repeat([[255] * 8 + [0] * 8], 16, axis=0))
    for name in ("colour.png", "brush.png", "grey.png"):
        one = ImageRecord("k", "unread.jpg", (16, 16), "", 1, False, 0, mask_path=str(tmp_path / name))
        found = Masks().read(one, SubsetSpec(alpha_mask=True), Cut((16, 16), (0, 0), (16, 16)))
        assert found is not None
        assert found.tolist() == [[255, 0], [255, 0]], name


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(33, 150), st.integers(33, 150)),
    scale=st.sampled_from([1.0, 0.5, 2.0]),
    seed=st.integers(0, 1000),
    random_crop=st.booleans(),
    face=st.booleans(),
    bucketed=st.booleans(),
)
def test_a_mask_fits_its_picture_after_every_augmentation(
    size: tuple[int, int], scale: float, seed: int, random_crop: bool, face: bool, bucketed: bool
) -> None:
    """The mask is the picture's own red channel, so what was done to one shows in the other."""
    augmentation = Augmentation(
        flip_aug=True, random_crop=random_crop, face_crop_aug_range=(1.0, 2.0) if face else None
    )
    rules = RULES if bucketed else BucketRules((64, 52))
    with tempfile.TemporaryDirectory() as folder:
        write_masked(Path(folder), [size], scale, ending="_20_20_12_16" if face else "")
        data = resolved(subset_with(Path(folder), augmentation=augmentation), rules=rules)
        images = TrainImages([data], None, seed)
        for epoch in (1, 2, 3):
            batch = images.load(MicroBatch(0, (Sample(0, 0),)), 0, 1, replace(CLOCK, epoch=epoch))
            found, expected = masks_of(batch), cells_of_red(batch)
            assert found.shape == expected.shape
            assert float((found - expected).abs().mean()) < (0.006 if scale == 1 else 0.02)


def test_transparency_is_a_mask_and_the_picture_stays_laid_over_white(tmp_path: Path) -> None:
    """A black picture over white is as bright as it is transparent."""
    for index, (width, height) in enumerate(SIZES):
        alpha = picture((width, height), index)[:, :, 0]
        write_transparent(tmp_path / "images" / f"{index}.png", np.zeros((height, width, 3)), alpha)
    for random_crop in (True, False):
        flips = Augmentation(flip_aug=True, random_crop=random_crop)
        data = resolved(subset_with(tmp_path, masked=False, alpha=True, augmentation=flips))
        for batch in batches_of(TrainImages([data], None, 5)):
            assert float((1 - cells_of_red(batch) - masks_of(batch)).abs().max()) < 0.01


def test_images_with_and_without_masks_share_a_batch(tmp_path: Path) -> None:
    """A folder with masks, one whose images are partly transparent, and one without either."""
    half = np.repeat([[0] * 32 + [255] * 32], 64, axis=0)
    for place in ("a", "b", "c"):
        write_picture(tmp_path / place / "images" / "x.png", (64, 64))
    write_transparent(tmp_path / "b" / "images" / "y.png", picture((64, 64)), half)
    write_mask(tmp_path / "a" / "masks" / "x.png", 255 - half)
    subsets = (
        subset_with(tmp_path / "a", alpha=True),  # its folder wins
        subset_with(tmp_path / "b", masked=False, alpha=True),
        subset_with(tmp_path / "c", masked=False),
    )
    images = TrainImages([resolved(*subsets, batch_size=4)], None, 5)
    (batch,) = batches_of(images, epochs=1)
    found = dict(zip(batch.keys, masks_of(batch), strict=True))
    assert set(found) == {"0.0/x.png", "0.1/x.png", "0.1/y.png", "0.2/x.png"}
    right = torch.tensor([[0.0] * 4 + [1.0] * 4] * 8)
    assert torch.equal(found["0.0/x.png"], 1 - right)
    assert torch.equal(found["0.1/y.png"], right)
    assert torch.equal(found["0.1/x.png"], torch.ones(8, 8))
    assert torch.equal(found["0.2/x.png"], torch.ones(8, 8))
    (alone,) = batches_of(TrainImages([resolved(subsets[2])], None, 5), epochs=1)
    assert alone.loss_masks_BHW is None
    lines = "\n".join(describe(images.datasets)[0].lines())
    assert f"masked by {tmp_path}/a/masks" in lines
    assert "masked by their transparency" in lines


# ---- with cached latents


@pytest.mark.parametrize("to_disk", [False, True])
def test_masks_of_cached_latents_are_those_of_the_pixels(tmp_path: Path, to_disk: bool) -> None:
    write_masked(tmp_path, SIZES)
    data = resolved(subset_with(tmp_path, augmentation=Augmentation(flip_aug=True)), rules=BucketRules((100, 60)))
    store = LatentStore("sd", "vae", to_disk=to_disk)
    (cached,), _ = cache_latents(
        [data], AveragingVae(), store, vae_batch_size=2, device=torch.device("cpu"), dtype=torch.float32
    )
    images, plain = TrainImages([cached], store, 5), TrainImages([data], None, 5)
    assert images.gives_latents(0)
    assert not images.in_memory(0)  # masks are read by the loader's threads
    flips = 0
    for ours, theirs in zip(batches_of(images), batches_of(plain), strict=True):
        assert ours.latents_BCHW is not None
        assert masks_of(ours).shape[1:] == ours.latents_BCHW.shape[2:]
        assert torch.equal(masks_of(ours), masks_of(theirs))
        flips += sum(ours.flipped)
    assert flips > 0
    shutil.rmtree(tmp_path / "masks")
    assert len(batches_of(images)) > 0  # read once


def test_a_mask_that_changes_after_caching_is_seen(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", (64, 64))
    found: list[torch.Tensor] = []
    for level in (255, 0):
        write_mask(tmp_path / "masks" / "a.png", np.full((64, 64), level))
        data = resolved(subset_with(tmp_path))
        store = LatentStore("sd", "vae", to_disk=True)
        (cached,), report = cache_latents(
            [data], AveragingVae(), store, vae_batch_size=2, device=torch.device("cpu"), dtype=torch.float32
        )
        assert report.reused == (level == 0)
        (batch,) = batches_of(TrainImages([cached], store, 5), epochs=1)
        assert batch.latents_BCHW is not None
        found.append(masks_of(batch))
    assert torch.equal(found[0], torch.ones(1, 8, 8))
    assert torch.equal(found[1], torch.zeros(1, 8, 8))


def alone(folder: Path, mask: np.ndarray | None, name: str = "a") -> DatasetSpec:
    """Latents that a metadata file names, without their image; written as other programs do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m.json").write_text(f'{{"{name}": {{"caption": "c", "train_resolution": [64, 32]}}}}')
    members = {} if mask is None else {"alpha_mask": mask}
    latents = np.zeros((4, 4, 8), np.float32)
    size, crop = np.array((64, 32)), np.zeros(4)
    archive = {"latents": latents, "latents_flipped": latents, "original_size": size, "crop_ltrb": crop}
    np.savez(folder / f"{name}.npz", **archive, **members)  # pyright: ignore[reportArgumentType]
    subset = SubsetSpec(
        image_dir=str(folder),
        metadata_file=str(folder / "m.json"),
        alpha_mask=True,
        augmentation=Augmentation(flip_aug=True),
    )
    return DatasetSpec(DatasetKind.FINETUNE, 1, None, (subset,))


@pytest.mark.parametrize("pixels_per_cell", [1, 8])
def test_latents_without_their_image_bring_a_mask(tmp_path: Path, pixels_per_cell: int) -> None:
    mask = np.tile(np.linspace(0, 1, 8, dtype=np.float32).repeat(pixels_per_cell), (4 * pixels_per_cell, 1))
    (data,) = resolve([alone(tmp_path, mask)])
    store = LatentStore("sd", "vae")
    assert store.find([target_of(data.records[0], data.fits[0])], [True]) == []
    batches = batches_of(TrainImages([data], store, 5), epochs=8)
    assert {batch.flipped for batch in batches} == {(True,), (False,)}
    expected = torch.linspace(0, 1, 8).expand(4, 8)
    for batch in batches:
        turned = expected.flip(1) if batch.flipped[0] else expected
        assert float((masks_of(batch)[0] - turned).abs().max()) < 0.003


def test_latents_without_image_and_mask_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.npz: alpha_mask: there is no image beside these latents"):
        resolve([alone(tmp_path, None)])
    (data,) = resolve([alone(tmp_path, np.ones((5, 5), np.float32))])
    store = LatentStore("sd", "vae")
    store.find([target_of(data.records[0], data.fits[0])], [True])
    with pytest.raises(BadImage, match="of another size than its latents"):
        batches_of(TrainImages([data], store, 5))


# ---- which mask belongs to which image


def test_missing_masks_are_named_all_at_once(tmp_path: Path) -> None:
    write_masked(tmp_path, [(64, 64)] * 4)
    (tmp_path / "masks" / "1.png").unlink()
    (tmp_path / "masks" / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as caught:
        resolved(subset_with(tmp_path))
    lines = str(caught.value).split("\n")
    assert lines[2:] == ["--on_bad_image skip leaves out images that lack their picture"]
    assert "images/1.png: has no mask; there is no 1.* in" in lines[0]
    assert f"images/2.png: its mask {tmp_path}/masks/2.png: " in lines[1]
    spec = DatasetSpec(DatasetKind.DREAMBOOTH, 2, RULES, (subset_with(tmp_path),))
    (left,) = resolve([spec], on_bad_image="skip")
    assert [record.key for record in left.records] == ["0.0/0.png", "0.0/3.png"]
    assert all(problem.lacks_pair for problem in left.problems)
    shutil.rmtree(tmp_path / "masks")
    with pytest.raises(UserError, match="masks: the folder cannot be read"):
        resolved(subset_with(tmp_path))


def test_masks_cannot_lie_among_the_images(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", (64, 64))
    (tmp_path / "masks").symlink_to(tmp_path / "images")
    with pytest.raises(UserError, match=r"masks: the folder of masks \(.*\) is that of the images"):
        resolved(subset_with(tmp_path))


def test_masks_of_a_metadata_file_lie_in_the_same_subfolders(tmp_path: Path) -> None:
    names = ("a", "one/a", "two/a")
    for level, name in enumerate(names):
        write_picture(tmp_path / "images" / f"{name}.png", (64, 64))
        write_mask(tmp_path / "masks" / f"{name}.png", np.full((64, 64), level * 100))
    rows = ", ".join(f'"{name}": {{"caption": "c"}}' for name in names)
    (tmp_path / "m.json").write_text(f"{{{rows}}}")
    subset = SubsetSpec(
        image_dir=str(tmp_path / "images"), metadata_file=str(tmp_path / "m.json"), mask_dir=str(tmp_path / "masks")
    )
    (data,) = resolve([DatasetSpec(DatasetKind.FINETUNE, 4, RULES, (subset,))])
    for record in data.records:
        assert Path(str(record.mask_path)) == tmp_path / "masks" / Path(record.path).relative_to(tmp_path / "images")
    assert len({record.mask_path for record in data.records}) == 3


def test_a_black_mask_and_formats_without_transparency_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_picture(tmp_path / "images" / "a.jpg", (64, 64))
    write_mask(tmp_path / "masks" / "a.png", np.zeros((64, 64)))
    with caplog.at_level(logging.WARNING):
        batches_of(TrainImages([resolved(subset_with(tmp_path))], None, 5))
        resolved(subset_with(tmp_path, masked=False, alpha=True))
    told = [record.message for record in caplog.records if "no caption" not in record.message]
    assert len(told) == 2
    assert "masks/a.png: the mask is 0 everywhere" in told[0]
    assert "alpha_mask masks nothing" in told[1]


def test_a_resumed_run_must_have_the_same_masks(tmp_path: Path) -> None:
    write_masked(tmp_path, [(64, 64)])
    plain = data_facts([resolved(subset_with(tmp_path, masked=False))])
    by_file = data_facts([resolved(subset_with(tmp_path))])
    by_alpha = data_facts([resolved(subset_with(tmp_path, masked=False, alpha=True))])
    assert by_file.keys() - plain.keys() == {"data set 1 masks"}
    assert by_file["data set 1 masks"] != by_alpha["data set 1 masks"]
    assert plain == {name: value for name, value in by_file.items() if name in plain}


def test_held_out_images_keep_their_masks(tmp_path: Path) -> None:
    write_masked(tmp_path, [(64, 64)] * 4)
    data = resolved(subset_with(tmp_path, alpha=True))
    _, (held_out,) = hold_out([data], ValidationOptions(validation_split=0.5))
    assert len(held_out.records) == 2
    (batch,) = batches_of(TrainImages([held_out], None, 5), epochs=1)
    assert torch.allclose(masks_of(batch), cells_of_red(batch), atol=0.004)


def test_processes_have_the_masks_of_their_own_images(tmp_path: Path) -> None:
    write_masked(tmp_path, [(64, 64)] * 4)
    images = TrainImages([resolved(subset_with(tmp_path))], None, 5)
    micro = MicroBatch(0, tuple(Sample(index, 0) for index in range(4)))
    whole = images.load(micro, 0, 1, CLOCK)
    shares = [images.load(micro, rank, 2, CLOCK) for rank in (0, 1)]
    by_key = dict(zip(whole.keys, masks_of(whole), strict=True))
    for share in shares:
        assert len(share.keys) == 2
        for key, mask in zip(share.keys, masks_of(share), strict=True):
            assert torch.equal(mask, by_key[key])


def test_the_debug_sheet_shows_what_counts(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", (64, 64))
    write_mask(tmp_path / "masks" / "a.png", np.repeat([[0] * 32 + [255] * 32], 64, axis=0))
    images = TrainImages([resolved(subset_with(tmp_path))], None, 5)
    sheet, _ = write_debug_sheets(images, plan_epoch(images.datasets, 5, 1, 1, 1), tmp_path / "out", CLOCK)
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    plain, masked = pixels[8:72, 8:72], pixels[8:72, 72:136]
    assert not masked[:, :32].any()
    assert np.array_equal(masked[:, 32:], plain[:, 32:])


# ---- configuration


def load(folder: Path, text: str) -> tuple[SubsetSpec, ...]:
    path = folder / "d.toml"
    path.write_text(text, encoding="utf-8")
    (spec,) = load_dataset_specs(DataOptions(dataset_config=path, resolution=(64, 64)), masks=True)
    return spec.subsets


def test_keys_of_a_data_set_file(tmp_path: Path) -> None:
    subsets = load(
        tmp_path,
        "[general]\nalpha_mask = true\n[[datasets]]\n"
        '[[datasets.subsets]]\nimage_dir = "a"\nconditioning_data_dir = "m"\nalpha_mask = false\n'
        '[[datasets.subsets]]\nimage_dir = "b"\nis_reg = true\nclass_tokens = "cat"\n',
    )
    assert [(one.mask_dir, one.conditioning_data_dir, one.alpha_mask) for one in subsets] == [
        ("m", None, False),
        (None, None, True),
    ]
    assert [one.uses_alpha for one in subsets] == [False, True]
    with pytest.raises(UserError, match="some have metadata_file and some have not"):
        load(
            tmp_path,
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nconditioning_data_dir = "m"\n'
            '[[datasets.subsets]]\nmetadata_file = "b.json"\n',
        )


def test_the_example_is_what_the_guide_says() -> None:
    options = DataOptions(dataset_config=ROOT / "examples" / "masked_dataset.toml")
    (spec,) = load_dataset_specs(options, masks=True)
    assert [(one.mask_dir is not None, one.uses_alpha, one.is_reg) for one in spec.subsets] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


def test_masks_of_the_folders_of_a_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("2_cat", "1_dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "reg" / "1_cat").mkdir(parents=True)
    masks = tmp_path / "masks"
    options = DataOptions(train_data_dir=str(tmp_path / "train"), resolution=(64, 64))

    def found(given: DataOptions = options) -> list[str | None]:
        (spec,) = load_dataset_specs(given, conditioning_data_dir=str(masks), masks=True)
        return [subset.mask_dir for subset in spec.subsets]

    with pytest.raises(UserError, match="masks: there is no such folder"):
        found()
    masks.mkdir()
    with pytest.raises(UserError, match="there is none of 1_dog, 2_cat"):
        found()
    (masks / "2_cat").mkdir()
    with_reg = replace(options, reg_data_dir=str(tmp_path / "reg"))
    with caplog.at_level(logging.WARNING):
        assert found(with_reg) == [None, str(masks / "2_cat"), None]
    assert "train/1_dog: has no masks" in caplog.text
    (masks / "2_cat").rmdir()
    (tmp_path / "train" / "2_cat").rmdir()
    assert found(with_reg) == [str(masks), None]


# ---- the loss


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_nothing_outside_the_mask_reaches_the_prediction(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(3, 4, 8, 8, generator=generator, requires_grad=True)
    target = torch.randn(3, 4, 8, 8, generator=generator)
    masks = torch.ones(3, 8, 8)
    masks[0, :, :4] = 0
    masks[1] = 0.25
    times, weights = torch.tensor([10, 500, 990]), torch.tensor([1.0, 1.0, 0.5])
    objective, schedule = Objective(NoiseOptions(), LossOptions(loss_type=kind, min_snr_gamma=5.0)), make_schedule()
    masked = objective.weighted_losses(pred, target, times, weights, schedule, masks)
    masked.sum().backward()
    assert pred.grad is not None
    assert not pred.grad[0, :, :, :4].any()
    assert bool(pred.grad[0, :, :, 4:].all())
    plain = objective.weighted_losses(pred, target, times, weights, schedule)
    assert torch.equal(masked[2], plain[2])
    assert torch.allclose(masked[1], plain[1] / 4)
    right = objective.weighted_losses(pred[:, :, :, 4:], target[:, :, :, 4:], times, weights, schedule)
    assert torch.allclose(masked[0], right[0] / 2)  # the mean is over all of the picture
    whole = objective.weighted_losses(pred, target, times, weights, schedule, torch.ones(3, 8, 8))
    assert torch.equal(whole, plain)
