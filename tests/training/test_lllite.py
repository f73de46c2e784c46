"""sdxl_train_control_net_lllite.py: what it learns, what it writes, arrangements that must not change the result."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.models.save import save_single_file
from tests.lllite_fixtures import SMALL, TWO_STEPS, Pairs, apart, run, same, write_stripes
from tests.toy import toy_modules, toy_spec
from tests.training.runs import (
    LLLITE_SCRIPT,
    command,
    launch_two,
    state,
    stop_after,
    tensors,
    write_pairs,
)

SIZES = [(130, 70), (70, 130), (64, 64), (200, 190)]
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "96")
LAYERS = 32
SGD = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_grad_norm", "0")  # moves well above rounding


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Pairs of which each has sizes, crop and bucket of its own."""
    return Pairs(*write_pairs(tmp_path_factory.mktemp("varied"), SIZES))


# ---- what it learns


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--mixed_precision", "bf16"),
        ("--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing"),
        ("--mixed_precision", "bf16", "--fp8_base"),
        ("--optimizer_type", "AdaFactor", "--network_dropout", "0.2"),
        ("--v_parameterization", "--min_snr_gamma", "5", "--noise_offset", "0.05"),
    ],
    ids=["plain", "bf16", "full bf16", "fp8", "adafactor", "v"],
)
def test_three_steps(
    options: tuple[str, ...], model_sdxl: Path, pairs: Pairs, tmp_path: Path, losses: list[float]
) -> None:
    file = run(model_sdxl, pairs, tmp_path, *SMALL, "--max_train_steps", "3", *options)
    assert len(losses) == 3
    assert all(np.isfinite(losses))
    found = tensors(file)
    assert len({key.partition(".")[0] for key in found}) == LAYERS
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert all(bool(tensor.any()) for key, tensor in found.items() if ".up.0.weight" in key)


def test_a_fresh_net_leaves_the_model_as_it_is(
    model_sdxl: Path, pairs: Pairs, tmp_path: Path, losses: list[float]
) -> None:
    """The first loss is that of the model without net, whatever the pictures; later ones depend on them."""
    run(model_sdxl, pairs, tmp_path / "a", *SMALL, *TWO_STEPS, "--learning_rate", "0.1")
    blank = tmp_path / "blank"
    blank.mkdir()
    for path in pairs.edges.iterdir():
        Image.new("RGB", (64, 64), "white").save(blank / path.name)
    run(model_sdxl, Pairs(pairs.images, blank), tmp_path / "b", *SMALL, *TWO_STEPS, "--learning_rate", "0.1")
    assert losses[0] == losses[2]
    assert losses[1] != losses[3]


def test_it_learns_to_follow_its_pictures(tmp_path: Path, losses: list[float]) -> None:
    """At nearly pure noise the target (velocity) is the image, which only the conditioning picture tells."""
    model, images, edges, wrong = write_stripes(tmp_path, "sdxl")
    shared = ("--train_batch_size", "2", "--cache_latents", "--v_parameterization", "--min_timestep", "980")
    learning = ("--max_train_steps", "60", "--learning_rate", "1e-2", "--cond_emb_dim", "16", "--network_dim", "16")
    file = run(model, Pairs(images, edges), tmp_path / "out", *shared, *learning)
    looking = ("--max_train_steps", "10", "--learning_rate", "1e-20", "--network_weights", str(file), "--seed", "11")
    found: dict[str, float] = {}
    for folder in (edges, wrong):
        losses.clear()
        run(model, Pairs(images, folder), tmp_path / f"of {folder.name}", *shared, *looking, "--optimizer_type", "SGD")
        found[folder.name] = mean(losses)
    assert found["edges"] < 0.85 * found["wrong"], found


def test_dropout_acts_and_is_repeatable(model_sdxl: Path, pairs: Pairs, begun: Path, tmp_path: Path) -> None:
    """With and without gradient checkpointing: the reference had it only with it."""
    shared = ("--network_weights", str(begun), *TWO_STEPS, *SGD)
    without = run(model_sdxl, pairs, tmp_path / "without", *shared)
    dropout = [
        run(model_sdxl, pairs, tmp_path / name, *shared, "--network_dropout", "0.5", *more)
        for name, more in {"a": (), "b": (), "c": ("--gradient_checkpointing",)}.items()
    ]
    assert same(dropout[0], dropout[1])
    assert apart(dropout[0], dropout[2], begun) < 1e-4
    assert apart(dropout[0], without, begun) > 0.1


# ---- arrangements


def test_accumulation_equals_the_big_batch(model_sdxl: Path, pairs: Pairs, begun: Path, tmp_path: Path) -> None:
    shared = ("--network_weights", str(begun), *TWO_STEPS, *SGD)
    big = run(model_sdxl, pairs, tmp_path / "big", "--train_batch_size", "4", *shared)
    small = run(model_sdxl, pairs, tmp_path / "small", "--gradient_accumulation_steps", "4", *shared)
    assert apart(big, small, begun) < 1e-3


def test_workers_checkpointing_and_caches_change_nothing(
    model_sdxl: Path, varied: Pairs, begun: Path, tmp_path: Path
) -> None:
    augmented = ("--flip_aug", "--train_batch_size", "2", *BUCKETS)
    shared = ("--network_weights", str(begun), *augmented, *TWO_STEPS, *SGD)
    plain = run(model_sdxl, varied, tmp_path / "plain", *shared)
    for name, options in {
        "workers": ("--max_data_loader_n_workers", "4"),
        "memory": ("--gradient_checkpointing",),
        "text": ("--cache_text_encoder_outputs",),
    }.items():
        assert apart(plain, run(model_sdxl, varied, tmp_path / name, *shared, *options), begun) < 1e-3, name


def test_cached_latents_equal_uncached_ones(varied: Pairs, begun: Path, tmp_path: Path) -> None:
    """With a VAE whose posterior has no width the draws do not matter; mirrored and cropped pairs must agree too."""
    modules: dict[str, Any] = dict(toy_modules("sdxl"))
    with torch.no_grad():
        modules["vae"].quant_conv.weight[4:] = 0
        modules["vae"].quant_conv.bias[4:] = -40
    narrow = tmp_path / "narrow.safetensors"
    save_single_file(narrow, toy_spec("sdxl"), modules, torch.float32, {})
    shared = ("--network_weights", str(begun), "--flip_aug", *BUCKETS, *TWO_STEPS, *SGD)
    pixels = run(narrow, varied, tmp_path / "pixels", *shared)
    for name, options in {
        "memory": ("--cache_latents",),
        "disk": ("--cache_latents_to_disk", "--max_data_loader_n_workers", "4"),
    }.items():
        assert apart(pixels, run(narrow, varied, tmp_path / name, *shared, *options), begun) < 2e-3, name


def test_two_interruptions_change_no_byte(
    model_sdxl: Path, varied: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    options = (
        "--max_train_steps", "5", "--train_batch_size", "2", "--gradient_accumulation_steps", "2", *BUCKETS, *SMALL,
        "--flip_aug", "--shuffle_caption", "--caption_dropout_rate", "0.2", "--network_dropout", "0.1",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "2",
    )  # fmt: skip
    whole, broken = run(model_sdxl, varied, tmp_path / "whole", *options), tmp_path / "broken"
    resume: tuple[str, ...] = ()
    for steps in (2, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            run(model_sdxl, varied, broken, *options, *resume)
        folder = broken / f"toy-step{steps:08d}-state"
        assert state(folder)["step"] == steps
        resume = ("--resume", str(folder))
    assert run(model_sdxl, varied, broken, *options, *resume).read_bytes() == whole.read_bytes()


def test_two_processes_equal_one_with_twice_the_batch(
    model_sdxl: Path, pairs: Pairs, begun: Path, tmp_path: Path
) -> None:
    shared = ("--conditioning_data_dir", str(pairs.edges), "--network_weights", str(begun), *TWO_STEPS, *SGD)
    shared += ("--cache_latents_to_disk", "--gradient_checkpointing")
    arguments = command(
        model_sdxl, pairs.images, tmp_path / "two", "--train_batch_size", "1", *shared, script=LLLITE_SCRIPT
    )
    done = launch_two("sdxl_train_control_net_lllite.py", arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    one = run(model_sdxl, pairs, tmp_path / "one", "--train_batch_size", "2", *shared)
    assert apart(one, tmp_path / "two" / "toy.safetensors", begun) < 1e-3
