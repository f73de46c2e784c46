"""Arrangements that must not change the result: accumulation, processes, workers, caches, checkpointing."""

from __future__ import annotations

import pytest
import torch

from tests.toy import toy_modules, toy_spec
from tests.training.processes import launch_torchrun
from tests.training.runs import SGD, command, difference, train, write_photos


def test_accumulation_equals_the_big_batch(model, photos, tmp_path):
    assert train(model, photos, tmp_path / "big", "--train_batch_size", "4", *SGD) == 0
    assert train(model, photos, tmp_path / "small", "--gradient_accumulation_steps", "4", *SGD) == 0
    assert difference(tmp_path / "big" / "toy.safetensors", tmp_path / "small" / "toy.safetensors") < 1e-3


def test_short_last_group_is_not_underweighted(model, tmp_path):
    """Three images: batch 3 equals accumulation of 2 + 1 with plain SGD only if the weights are right."""
    data = write_photos(tmp_path / "data", [(64, 64)] * 3)
    sgd = (*SGD, "--max_train_steps", "1")
    assert train(model, data, tmp_path / "big", "--train_batch_size", "3", *sgd) == 0
    more = ("--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    assert train(model, data, tmp_path / "parts", *more, *sgd) == 0
    assert difference(tmp_path / "big" / "toy.safetensors", tmp_path / "parts" / "toy.safetensors") < 1e-4


def test_two_processes_equal_one_with_twice_the_batch(model, photos, tmp_path):
    # with clip_skip the encoder's last layer gets no gradient, which several processes must bear
    shared = ("--cache_latents_to_disk", "--clip_skip", "2", "--max_train_steps", "2", *SGD)
    arguments = command(model, photos, tmp_path / "two", "--train_batch_size", "1", *shared)
    done = launch_torchrun("train_network.py", arguments, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    assert train(model, photos, tmp_path / "one", "--train_batch_size", "2", *shared) == 0
    assert difference(tmp_path / "one" / "toy.safetensors", tmp_path / "two" / "toy.safetensors") < 1e-3


@pytest.mark.parametrize("options", [("--max_data_loader_n_workers", "4"), ("--gradient_checkpointing",)])
def test_workers_and_checkpointing_change_nothing(model, photos, tmp_path, options):
    more = ("--shuffle_caption", "--flip_aug", "--color_aug", "--train_batch_size", "2", *SGD)
    assert train(model, photos, tmp_path / "plain", *more) == 0
    assert train(model, photos, tmp_path / "other", *more, *options) == 0
    assert difference(tmp_path / "plain" / "toy.safetensors", tmp_path / "other" / "toy.safetensors") < 1e-5


def test_cached_latents_equal_uncached_ones(photos, tmp_path):
    """With a VAE whose posterior has no width the draws do not matter, so both ways must agree."""
    from library.models.save import save_single_file

    modules = toy_modules("sd1", 0)
    with torch.no_grad():
        quant = modules["vae"].quant_conv
        quant.weight[4:] = 0
        quant.bias[4:] = -40
    narrow = tmp_path / "narrow.safetensors"
    save_single_file(narrow, toy_spec("sd1"), modules, torch.float32, {})
    for name, more in {"pixels": (), "memory": ("--cache_latents",), "disk": ("--cache_latents_to_disk",)}.items():
        assert train(narrow, photos, tmp_path / name, "--train_batch_size", "2", "--flip_aug", *more, *SGD) == 0
    for name in ("memory", "disk"):
        assert difference(tmp_path / "pixels" / "toy.safetensors", tmp_path / name / "toy.safetensors") < 1e-3
