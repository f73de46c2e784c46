"""Three steps on each form of data set, and with each optimizer and schedule."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from library.families.sd import SdFamily
from library.training import caching
from tests.cells_fixtures import Runner
from tests.training.runs import write_photos

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "cache"
FOLDER = "1_sks thing"


@pytest.fixture
def fit(tmp_path, model, model_sd2, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sd1": model, "sd2": model_sd2}, photos, monkeypatch)


# ---- optimizers and schedules


@pytest.mark.parametrize(
    ("rate", "recorded", "options"),
    [
        ("1e-3", "torch.optim.adamw.AdamW", "--lr_scheduler cosine"),
        ("1e-3", "bitsandbytes.optim.adamw.AdamW8bit", "--optimizer_type AdamW8bit --lr_scheduler linear"),
        ("1e-4", "lion_pytorch", "--optimizer_type Lion --lr_scheduler constant_with_warmup --lr_warmup_steps 1"),
        ("1", "prodigyopt", "--optimizer_type Prodigy --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 2"),
        ("1e-3", "Adafactor", "--optimizer_type AdaFactor"),
        (
            "1e-3",
            "relative_step=False",
            "--optimizer_type adafactor --optimizer_args relative_step=False --lr_scheduler constant_with_warmup",
        ),
        ("1e-3", "schedulefree", "--optimizer_type AdamWScheduleFree"),
        ("1", "dadaptation", "--optimizer_type DAdaptAdam --lr_scheduler inverse_sqrt"),
        (
            "0.1",
            "momentum=0.9",
            "--optimizer_type SGDNesterov --lr_scheduler polynomial --lr_scheduler_power 2",
        ),
        (
            "1e-3",
            "RMSprop",
            "--optimizer_type torch.optim.RMSprop --lr_scheduler_type StepLR --lr_scheduler_args step_size=1",
        ),
        (
            "1e-3",
            "adam.Adam(betas=(0.5, 0.9))",
            "--optimizer_type torch.optim.adam.Adam --optimizer_args betas=.5,.9 --lr_scheduler_type"
            " torch.optim.lr_scheduler.CosineAnnealingLR --lr_scheduler_args T_max=3",
        ),
        (
            "1e-3",
            "NAdam",
            "--optimizer_type NAdam --lr_scheduler piecewise_constant --lr_scheduler_args step_rules='1:1,0.1:2,0.01'",
        ),
        ("1e-3", "Muon(adam_ratio=0.2)", "--optimizer_type Muon --optimizer_args adam_ratio=0.2"),
        ("1e-3", "AdamW", "--lr_scheduler warmup_stable_decay --lr_warmup_steps 0.4"),
    ],
)
def test_optimizers_and_schedules(fit, rate, recorded, options):
    done = fit("--learning_rate", rate, *options.split())
    assert recorded in done.metadata["ss_optimizer"]
    assert not done.unmoved


# ---- folders


def test_regularisation_images_count_by_their_weight(fit, tmp_path):
    """Same draws, so only the losses of regularisation images change with the weight."""
    reg = write_photos(tmp_path / "reg", [(64, 64)] * 2, seed=1)
    options = ("--reg_data_dir", str(reg), "--learning_rate", "1e-9")
    whole = fit(*options, steps=8)
    half = fit(*options, "--prior_loss_weight", "0.5", steps=8)
    assert whole.metadata["ss_num_reg_images"] == "2"
    is_reg = [report.keys[0].startswith("0.1/") for report in whole.reports]
    assert sum(is_reg) == 4
    for of_whole, of_half, reg_image in zip(whole.losses, half.losses, is_reg, strict=True):
        assert of_half == pytest.approx(of_whole * (0.5 if reg_image else 1.0), rel=1e-3)


def test_buckets_crops_and_colours(fit, tmp_path):
    """Each option is seen by the model: no two of the runs have the same first losses."""
    data = write_photos(tmp_path / "data", [(136, 80)])
    image = data / FOLDER / "photo0.png"
    face = image.with_name("photo0_40_40_30_30.png")
    image.rename(face)
    image.with_suffix(".caption").rename(face.with_suffix(".caption"))
    buckets = ("--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "8")
    runs = {
        "plain": (),
        "buckets": buckets,
        "no_upscale": (*buckets, "--bucket_no_upscale", "--resolution", "512"),
        "random_crop": ("--random_crop",),
        "color_aug": ("--color_aug",),
        "face": ("--face_crop_aug_range", "1.5,2.0"),
        "face_random": ("--face_crop_aug_range", "1.5,2.0", "--random_crop"),
        "flip": ("--flip_aug", "--seed", "9"),
    }
    losses = {name: tuple(fit(*options, data=data, steps=2).losses) for name, options in runs.items()}
    assert len(set(losses.values())) == len(runs)


# ---- metadata files


def write_metadata(folder: Path, names: list[str], **fields) -> Path:
    """A metadata JSON for images ``names`` (stems)."""
    path = folder / "meta.json"
    entries = {name: {"caption": f"a thing, {name}", "tags": "table, light", **fields} for name in names}
    path.write_text(json.dumps(entries))
    return path


def test_metadata_file(fit, photos, tmp_path):
    names = [f"photo{index}" for index in range(3)]
    done = fit("--in_json", str(write_metadata(tmp_path, names)), data=photos / FOLDER)
    assert {Path(key).stem for report in done.reports for key in report.keys} == set(names)
    assert done.metadata["ss_num_train_images"] == "3"
    assert json.loads(done.metadata["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 1, "img_count": 3}}


@pytest.mark.parametrize("image", ["older", "newer", "absent", "of another VAE"])
def test_latents_prepared_by_the_reference(fit, tmp_path, monkeypatch, caplog, image):
    """They are used in place of pixels; but not if their image changed since or the VAE gives others: that is said."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(GOLDEN / "chelsea_sd1.npz", folder / "chelsea.npz")
    if image != "absent":
        shutil.copy(GOLDEN / "chelsea.png", folder / "chelsea.png")
        os.utime(folder / "chelsea.png", (1e9, 1e9) if image != "newer" else (4e9, 4e9))
    if image != "of another VAE":
        with np.load(GOLDEN / "chelsea_sd1.npz") as archive:
            mean_CHW = torch.from_numpy(archive["latents"])
        monkeypatch.setattr(caching._MeanOfVae, "__call__", lambda *_: mean_CHW)
    is_used = image in ("older", "absent")
    meta = write_metadata(tmp_path, ["chelsea"], train_resolution=[320, 192])
    asked = []
    original = SdFamily.encode_images
    monkeypatch.setattr(SdFamily, "encode_images", lambda *args: asked.append(1) or original(*args))
    options = ("--in_json", str(meta), "--resolution", "256", "--enable_bucket", "--flip_aug")
    done = fit(*options, data=folder, steps=2)
    assert not done.unmoved
    assert "[320, 192]" in done.metadata["ss_bucket_info"]
    assert bool(asked) != is_used
    assert ("prepared latents of 1 images are not used" in caplog.text) != is_used


# ---- data set files


def test_data_set_files_of_two_kinds_and_sizes(fit, photos, tmp_path):
    """TOML and JSON say the same; data sets keep their own size, batch size and kind."""
    images = str(photos / FOLDER)
    meta = str(write_metadata(tmp_path, ["photo0", "photo1"]))
    document = {
        "general": {"shuffle_caption": True, "caption_extension": ".caption"},
        "datasets": [
            {
                "resolution": 64,
                "batch_size": 2,
                "subsets": [{"image_dir": images, "class_tokens": "sks", "num_repeats": 2, "flip_aug": True}],
            },
            {
                "resolution": [96, 64],
                "enable_bucket": True,
                "min_bucket_reso": 32,
                "bucket_reso_steps": 8,
                "subsets": [{"image_dir": images, "metadata_file": meta}],
            },
        ],
    }
    (tmp_path / "data.json").write_text(json.dumps(document))
    (tmp_path / "data.toml").write_text(as_toml(document))
    runs = [fit("--dataset_config", str(tmp_path / f"data.{kind}"), steps=6) for kind in ("json", "toml")]
    assert runs[0].losses == runs[1].losses
    sizes = {(report.keys[0].partition(".")[0], report.sample_count) for report in runs[0].reports}
    assert sizes == {("0", 2), ("1", 1)}
    first, second = json.loads(runs[0].metadata["ss_datasets"])
    assert (first["is_dreambooth"], first["batch_size_per_device"], first["resolution"]) == (True, 2, [64, 64])
    assert (second["is_dreambooth"], second["batch_size_per_device"], second["resolution"]) == (False, 1, [96, 64])
    assert (first["num_train_images"], second["num_train_images"]) == (8, 2)


def as_toml(document: dict) -> str:
    """The document above as TOML: its values are written alike in both languages."""
    lines = ["[general]", *pairs(document["general"])]
    for dataset in document["datasets"]:
        lines += ["[[datasets]]", *pairs({key: value for key, value in dataset.items() if key != "subsets"})]
        for subset in dataset["subsets"]:
            lines += ["[[datasets.subsets]]", *pairs(subset)]
    return "\n".join(lines) + "\n"


def pairs(table: dict) -> list[str]:
    """Lines ``key = value``."""
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]
