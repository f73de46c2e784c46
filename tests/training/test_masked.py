"""Training on a part of the picture: whole runs of every kind with masks of each form."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.diffusion import objective
from library.options.script import parse
from library.options.scripts import CACHE_LATENTS, CHECK_DATASET, FINE_TUNE, SDXL_TRAIN_NETWORK
from library.preparation.check_run import check_dataset
from library.training.ahead import cache_latents_ahead
from library.training.script import Script
from tests.lllite_fixtures import Pairs
from tests.masks_fixtures import write_mask, write_transparent
from tests.training.bench import Bench, refused
from tests.training.runs import (
    CONTROL_SCRIPT,
    SCRIPT,
    SGD,
    difference,
    metadata,
    state,
    stop_after,
    tensors,
    train,
    write_photos,
)
from tests.words_fixtures import SD, XTI

FULL = Script(FINE_TUNE, kind="library.training.kinds.full:FullTraining", tracker_name="fine_tuning")
SIZES = [(64, 64), (96, 64), (64, 96), (80, 80)]
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32")
ALL_OF_IT = ("--flip_aug", "--random_crop", "--train_batch_size", "2", "--loss_type", "huber", "--min_snr_gamma", "5")
WORD = ("--token_string", "sksx", "--use_object_template", "--save_model_as", "safetensors")
UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Masked:
    """Photos in ``data/1_sks thing``, and folders of masks for them; ``alpha`` holds the same masks in the images."""

    data: Path
    folder: Path

    def by(self, name: str) -> tuple[str, ...]:
        """The options for one of the folders: ones, zeros, halves."""
        return ("--masked_loss", "--conditioning_data_dir", str(self.folder / name))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Masked:
    folder = tmp_path_factory.mktemp("masked")
    data = write_photos(folder / "data", SIZES)
    transparent = folder / "alpha" / "1_sks thing"
    shutil.copytree(data / "1_sks thing", transparent)
    for photo in sorted((data / "1_sks thing").glob("*.png")):
        with Image.open(photo) as opened:
            pixels = np.asarray(opened)
        height, width = pixels.shape[:2]
        half = np.zeros((height, width))
        half[:, : width // 2] = 255
        for name, mask in (("ones", half * 0 + 255), ("zeros", half * 0), ("halves", half)):
            write_mask(folder / name / photo.name, mask)
        write_transparent(transparent / photo.name, pixels, half)
    return Masked(data, folder)


def same(one: Path, other: Path) -> bool:
    left, right = (tensors(folder / "toy.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---- what is learned


@pytest.mark.parametrize(("script", "more"), [(SCRIPT, ALL_OF_IT), (FULL, ()), (SD, WORD), (XTI, WORD)])
def test_white_masks_change_nothing_and_black_ones_leave_nothing_to_learn(
    model: Path, masked: Masked, tmp_path: Path, script: Script, more: tuple[str, ...]
) -> None:
    """Adam moves what has any gradient at all, however small."""
    usual = (*BUCKETS, *more, "--max_train_steps", "2", "--optimizer_args", "weight_decay=0")
    for name, options in (("plain", ()), ("ones", masked.by("ones")), ("zeros", masked.by("zeros"))):
        assert train(model, masked.data, tmp_path / name, *usual, *options, script=script) == 0
    assert same(tmp_path / "plain", tmp_path / "ones")
    assert not same(tmp_path / "plain", tmp_path / "zeros")
    longer = (*usual, *masked.by("zeros"), "--max_train_steps", "3")
    assert train(model, masked.data, tmp_path / "longer", *longer, script=script) == 0
    assert same(tmp_path / "zeros", tmp_path / "longer")
    left = tensors(tmp_path / "zeros" / "toy.safetensors")
    if script is SCRIPT:
        assert not any(bool(up.any()) for key, up in left.items() if ".lora_up." in key)
    if script is FULL:
        before = tensors(model)
        assert all(torch.equal(left[key], before[key]) for key in before if key.startswith(UNET))
    recorded = metadata(tmp_path / "ones" / "toy.safetensors")
    assert recorded["ss_masked_loss"] == "True"
    assert metadata(tmp_path / "plain" / "toy.safetensors")["ss_masked_loss"] == "False"


def test_what_is_masked_out_is_not_learned(model_sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of which more than half is garbage. At the last timestep a model of velocity has to draw all of the
    picture out of noise, so its errors show which parts it has learned.
    """
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[:, 24:] = (0, 40, 0)
    place = write_photos(tmp_path / "data", [(64, 64)]) / "1_sks thing"
    Image.fromarray(pixels).save(place / "photo0.png")
    mask = np.zeros((64, 64))
    mask[:, :24] = 255
    write_mask(tmp_path / "masks" / "photo0.png", mask)
    seen: list[tuple[float, float]] = []
    original = objective.errors

    def errors(*arguments: Any):
        error_BCHW = original(*arguments)
        of_cells = error_BCHW.detach()
        seen.append((float(of_cells[..., :3].mean()), float(of_cells[..., 3:].mean())))
        return error_BCHW

    monkeypatch.setattr(objective, "errors", errors)
    usual = ("--v2", "--v_parameterization", "--min_timestep", "999", "--learning_rate", "2e-3")
    usual += ("--max_train_steps", "30")

    def run(name: str, *more: str) -> tuple[np.ndarray, np.ndarray]:
        """Errors inside and outside of the mask, at the first step and over the last ten."""
        seen.clear()
        assert train(model_sd2, tmp_path / "data", tmp_path / name, *usual, *more, script=FULL) == 0
        return np.array(seen[0]), np.mean(seen[-10:], axis=0)

    before, after = run("masked", "--masked_loss", "--conditioning_data_dir", str(tmp_path / "masks"))
    _, without = run("plain")
    print("before", before, "masked", after, "whole", without)
    assert after[0] < before[0] / 4
    assert after[0] < 1.2 * without[0]
    assert without[1] < before[1] / 4  # it could be learned
    assert after[1] > 2 * without[1]


def test_transparency_is_the_same_as_masks_in_a_folder(model: Path, masked: Masked, tmp_path: Path) -> None:
    """Of one and the same images, which are trained over white in both ways."""
    data, more = masked.folder / "alpha", (*BUCKETS, *ALL_OF_IT)
    assert train(model, data, tmp_path / "folder", *more, *masked.by("halves")) == 0
    assert train(model, data, tmp_path / "alpha", *more, "--alpha_mask") == 0
    assert train(model, data, tmp_path / "whole", *more) == 0
    assert same(tmp_path / "folder", tmp_path / "alpha")
    assert not same(tmp_path / "folder", tmp_path / "whole")
    assert metadata(tmp_path / "alpha" / "toy.safetensors")["ss_alpha_mask"] == "True"


def mixed(masked: Masked, path: Path, batch_size: int) -> tuple[str, str]:
    """A data set file of a subset with masks, one with transparency, and regularisation images with neither."""
    photos = masked.data / "1_sks thing"
    reg = write_photos(path.parent / f"reg{batch_size}", [(64, 64)] * 2, seed=9) / "1_sks thing"
    path.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = {batch_size}\n"
        f'[[datasets.subsets]]\nimage_dir = "{photos}"\nconditioning_data_dir = "{masked.folder / "halves"}"\n'
        f'[[datasets.subsets]]\nimage_dir = "{masked.folder / "alpha" / "1_sks thing"}"\nalpha_mask = true\n'
        f'[[datasets.subsets]]\nimage_dir = "{reg}"\nis_reg = true\n'
    )
    return "--dataset_config", str(path)


def test_subsets_with_and_without_masks_accumulate_to_the_same(model: Path, masked: Masked, tmp_path: Path) -> None:
    """Batches that hold both kinds equal single images one after the other."""
    usual = ("--masked_loss", "--max_train_steps", "2", *SGD)
    big, small = (mixed(masked, tmp_path / f"{size}.toml", size) for size in (4, 1))
    accumulate = ("--gradient_accumulation_steps", "4")
    assert train(model, masked.data, tmp_path / "big", *usual, *big) == 0
    assert train(model, masked.data, tmp_path / "small", *usual, *small, *accumulate) == 0
    assert difference(tmp_path / "big" / "toy.safetensors", tmp_path / "small" / "toy.safetensors") < 1e-3
    (data,) = json.loads(metadata(tmp_path / "big" / "toy.safetensors")["ss_datasets"])
    assert [one.get("conditioning_data_dir") for one in data["subsets"]] == ["halves", None, None]
    assert [one.get("alpha_mask") for one in data["subsets"]] == [None, True, None]


def test_a_resumed_run_goes_on_bit_for_bit_and_notices_other_masks(
    model: Path,
    masked: Masked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = (*BUCKETS, "--flip_aug", "--cache_latents_to_disk", "--train_batch_size", "2", *masked.by("halves"))
    data = shutil.copytree(masked.data, tmp_path / "data")  # the archives are written there
    assert train(model, data, tmp_path / "whole", *usual) == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert train(model, data, tmp_path / "parts", *usual) == 0
    folder = str(tmp_path / "parts" / "toy-step00000002-state")
    assert state(Path(folder))["step"] == 2
    assert train(model, data, tmp_path / "parts", *usual, "--resume", folder) == 0
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert train(model, data, tmp_path / "other", *usual, "--alpha_mask", "--resume", folder) == 1
    assert "alpha_mask: False in the state, True now" in capsys.readouterr().err


def test_the_validation_loss_is_masked_too(
    model: Path, masked: Masked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = (*BUCKETS, "--validation_split", "0.5", "--max_train_steps", "1")
    found: dict[str, str] = {}
    for name, more in (("plain", ()), ("ones", masked.by("ones")), ("zeros", masked.by("zeros"))):
        caplog.clear()
        assert train(model, masked.data, tmp_path / name, *usual, *more) == 0
        (line,) = [record.message for record in caplog.records if record.message.startswith("step 0: loss/validation")]
        match = re.match(r"step 0: loss/validation ([\d.]+)", line)
        assert match
        found[name] = match[1]
    assert found["plain"] == found["ones"]
    assert float(found["plain"]) > 0 == float(found["zeros"])


# ---- ControlNets, tools


def test_a_controlnet_takes_masks_from_transparency_only(
    model: Path, pairs: Pairs, bench: Bench, tmp_path: Path
) -> None:
    images = shutil.copytree(pairs.images, tmp_path / "images")
    for photo in images.glob("*.png"):
        with Image.open(photo) as opened:
            pixels = np.asarray(opened)
        write_transparent(photo, pixels, np.zeros(pixels.shape[:2]))
    usual = ("--conditioning_data_dir", str(pairs.edges), "--max_train_steps", "1")
    for name, more in (("plain", ()), ("alpha", ("--alpha_mask",))):
        assert train(model, images, tmp_path / name, *usual, *more, script=CONTROL_SCRIPT) == 0
    moved = [
        any(
            bool(zero.any()) for key, zero in tensors(tmp_path / name / "toy.safetensors").items() if "zero_conv" in key
        )
        for name in ("plain", "alpha")
    ]
    assert moved == [True, False]
    bench.capsys.readouterr()
    assert train(model, images, tmp_path / "no", *usual, "--masked_loss", script=CONTROL_SCRIPT) == 1
    said = bench.capsys.readouterr().err
    assert "--masked_loss: conditioning_data_dir holds the pictures to draw after here" in said
    assert "--alpha_mask" in said


def test_the_tools_take_the_file_of_a_masked_training(model: Path, masked: Masked, tmp_path: Path) -> None:
    photos = shutil.copytree(masked.data, tmp_path / "data") / "1_sks thing"
    masks = shutil.copytree(masked.folder / "halves", tmp_path / "masks")
    file = tmp_path / "data.toml"
    file.write_text(
        "[[datasets]]\nresolution = 64\n"
        f'[[datasets.subsets]]\nimage_dir = "{photos}"\nconditioning_data_dir = "{masks}"\n'
    )
    run = tmp_path / "run.toml"
    run.write_text(
        f'masked_loss = true\ndataset_config = "{file}"\nconditioning_data_dir = ""\n'
        f'pretrained_model_name_or_path = "{model}"\nnetwork_module = "networks.lora"\noutput_dir = "x"\n'
    )
    words = ["--config_file", str(run), "--max_data_loader_n_workers", "0"]
    assert cache_latents_ahead(parse(CACHE_LATENTS, words)).encoded == 4
    assert parse(SDXL_TRAIN_NETWORK, [*words, "--bucket_reso_steps", "32"]).value_of("masked_loss") is True
    (masks / "photo2.png").unlink()
    report = check_dataset(parse(CHECK_DATASET, [*words, "--html", ""]))
    assert [Path(one.path).name for one in report.of_kind("unpaired")] == ["photo2.png"]
    assert not report.of_kind("unreadable")
    straight = ["--train_data_dir", str(masked.data), "--conditioning_data_dir", str(masks), "--html", "", *words[2:]]
    assert len(check_dataset(parse(CHECK_DATASET, straight)).of_kind("unpaired")) == 1


# ---- refusals


def test_masks_that_cannot_be_meant(bench: Bench) -> None:
    folder = ("--conditioning_data_dir", bench.tmp / "masks")
    refused(bench, folder, "--conditioning_data_dir needs --masked_loss")
    refused(bench, ("--masked_loss",), "--masked_loss: no masks are named", "--alpha_mask")
    refused(bench, ("--masked_loss", *folder), "--conditioning_data_dir", "there is no such folder")
    for name in ("photo0", "photo1", "photo3"):
        write_mask(bench.tmp / "masks" / f"{name}.png", np.zeros((64, 64)))
    missing, way_out = bench.refusal("--masked_loss", *folder)
    assert "photo2.png: has no mask; there is no photo2.* in" in missing
    assert way_out.startswith("--on_bad_image skip")
    file = bench.file(
        "d.toml",
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{bench.photos / "1_sks thing"}"\n'
        f'conditioning_data_dir = "{bench.tmp / "masks"}"\n',
    )
    refused(bench, ("--dataset_config", file), "line 5", "for masks add --masked_loss")
