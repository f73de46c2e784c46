"""The space that the files of a run take, and the warning if there is less."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.options.script import parse
from library.options.scripts import TRAIN_NETWORK
from library.training import disk
from library.training.clock import Clock

NEEDED = "--pretrained_model_name_or_path m --network_module n --train_data_dir d --resolution 64 --output_dir out"
# Saves 100 numbers, of which 10 learn.
TRAINABLE: Any = SimpleNamespace(trained_parameters=lambda: [torch.zeros(10)], saved_numbers=lambda: 100)


@pytest.mark.parametrize(
    ("more", "models", "states"),
    [
        ("", 400, 0),
        ("--save_precision fp16", 200, 0),
        ("--save_every_n_steps 4", 400 * 3, 0),
        ("--save_every_n_steps 4 --save_state", 400 * 3, 120 * 3),
        ("--ema_decay 0.9 --save_state_on_train_end", 800, 160),
    ],
)
def test_what_a_run_of_ten_steps_takes(more: str, models: int, states: int) -> None:
    settings, clock = parse(TRAIN_NETWORK, [*NEEDED.split(), *more.split()]), Clock(10, 10)
    assert disk.output_bytes(settings, TRAINABLE, clock) == {"models": models, "states": states}


def test_too_little_space_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    settings = parse(TRAIN_NETWORK, NEEDED.split())
    for free, told in ((400, False), (399, True)):
        monkeypatch.setattr(disk, "free_bytes", lambda _, free=free: free)
        with caplog.at_level(logging.WARNING):
            disk.warn_of_full_disk(settings, TRAINABLE, Clock(10, 10))
        assert ("--output_dir out: its files need about" in caplog.text) == told
