"""SDXL: arrangements that must not change the result, and runs that are interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.models.save import save_single_file
from tests.toy import toy_modules, toy_spec
from tests.training.runs import (
    SDXL_SCRIPT,
    SGD,
    command,
    difference,
    launch_two,
    state,
    stop_after,
    train,
    write_photos,
)

TWO_STEPS = ("--max_train_steps", "2")
SIZES = [(130, 70), (70, 130), (64, 64), (200, 190)]
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "96")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Photos of which each has sizes, crop and bucket of its own."""
    return write_photos(tmp_path_factory.mktemp("pictures"), SIZES)


def run(model: Path, data: Path, out: Path, *options: str) -> Path:
    """The file that a run with these options writes."""
    assert train(model, data, out, *options, script=SDXL_SCRIPT) == 0
    return out / "toy.safetensors"


def test_accumulation_equals_the_big_batch(model_sdxl, photos, tmp_path):
    options = ("--text_encoder_lr", "0.1", "0.05", "--unet_lr", "0.1", *TWO_STEPS, *SGD)
    big = run(model_sdxl, photos, tmp_path / "big", "--train_batch_size", "4", *options)
    small = run(model_sdxl, photos, tmp_path / "small", "--gradient_accumulation_steps", "4", *options)
    assert difference(big, small) < 1e-3


def test_two_processes_equal_one_with_twice_the_batch(model_sdxl, photos, tmp_path):
    """Neither process may be stopped by the first encoder's last layer, which gets no gradient."""
    shared = ("--cache_latents_to_disk", *TWO_STEPS, *SGD)
    arguments = command(model_sdxl, photos, tmp_path / "two", "--train_batch_size", "1", *shared)
    done = launch_two("sdxl_train_network.py", arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    one = run(model_sdxl, photos, tmp_path / "one", "--train_batch_size", "2", *shared)
    assert difference(one, tmp_path / "two" / "toy.safetensors") < 1e-3


def test_workers_and_checkpointing_change_nothing(model_sdxl, pictures, tmp_path):
    shared = ("--shuffle_caption", "--flip_aug", "--color_aug", "--train_batch_size", "2", *BUCKETS, *TWO_STEPS, *SGD)
    plain = run(model_sdxl, pictures, tmp_path / "plain", *shared)
    for name, options in {
        "workers": ("--max_data_loader_n_workers", "4"),
        "memory": ("--gradient_checkpointing",),
    }.items():
        assert difference(plain, run(model_sdxl, pictures, tmp_path / name, *shared, *options)) < 1e-5


def test_cached_latents_equal_uncached_ones(pictures, tmp_path):
    """With a VAE whose posterior has no width the draws do not matter; sizes and crops must agree too."""
    modules = toy_modules("sdxl", 0)
    with torch.no_grad():
        quant = modules["vae"].quant_conv
        quant.weight[4:] = 0
        quant.bias[4:] = -40
    narrow = tmp_path / "narrow.safetensors"
    save_single_file(narrow, toy_spec("sdxl"), modules, torch.float32, {})
    shared = ("--flip_aug", *BUCKETS, *TWO_STEPS, *SGD)
    pixels = run(narrow, pictures, tmp_path / "pixels", *shared)
    for option in ("--cache_latents", "--cache_latents_to_disk"):
        assert difference(pixels, run(narrow, pictures, tmp_path / option, *shared, option)) < 1e-3


def test_two_interruptions_change_no_byte(model_sdxl, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    options = (
        "--max_train_steps", "6", "--train_batch_size", "2", "--gradient_accumulation_steps", "2", *BUCKETS,
        "--flip_aug", "--shuffle_caption", "--caption_dropout_rate", "0.2", "--network_dropout", "0.1",
        "--text_encoder_lr", "1e-3", "5e-4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2",
        "--network_args", "rank_dropout=0.1", "conv_dim=2", "block_dims=" + ",".join(["2"] * 19),
    )  # fmt: skip
    whole, broken = run(model_sdxl, pictures, tmp_path / "whole", *options), tmp_path / "broken"
    resume: tuple[str, ...] = ()
    for steps in (2, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert train(model_sdxl, pictures, broken, *options, *resume, script=SDXL_SCRIPT) == 0
        folder = broken / f"toy-step{steps:08d}-state"
        assert state(folder)["step"] == steps
        assert not (broken / "toy.safetensors").exists()
        resume = ("--resume", str(folder))
    assert run(model_sdxl, pictures, broken, *options, *resume).read_bytes() == whole.read_bytes()


def test_other_rates_of_the_text_encoders_are_another_run(model_sdxl, photos, tmp_path, capsys):
    """The second rate of the list counts as much as the first."""
    base = ("--max_train_steps", "2", "--save_state_on_train_end")
    assert train(model_sdxl, photos, tmp_path, *base, "--text_encoder_lr", "1e-3", "5e-4", script=SDXL_SCRIPT) == 0
    resume = (*base, "--max_train_steps", "3", "--resume", str(tmp_path / "toy-state"))
    assert train(model_sdxl, photos, tmp_path, *resume, "--text_encoder_lr", "1e-3", "4e-4", script=SDXL_SCRIPT) == 1
    said = capsys.readouterr().err
    assert "text_encoder_lr" in said
    assert "0.0005" in said
