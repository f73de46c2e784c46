"""The figures of benchmarks/memory.py, at toy size."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from benchmarks.memory import ROWS, run
from benchmarks.random_models import SDXL_SIZES
from library.training.machine import open_machine
from library.training.trackers import Trackers

TOY = argparse.Namespace(dtype="fp32", pixels=64, batch=1, rank=4, steps=1)


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Any]]:
    """All rows, measured in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    settings = ROWS["LoRA"].settings(TOY)
    machine = open_machine(settings, Trackers(settings, "benchmark"))
    return {name: run(row, TOY, machine, SDXL_SIZES["toy"]) for name, row in ROWS.items()}


def test_our_layers_keep_less_than_torchs(figures: dict[str, dict[str, Any]]) -> None:
    ours, theirs = figures["LoRA"], figures["LoRA, torch's own layers"]
    assert ours["kept"] < 0.9 * theirs["kept"]
    assert ours["weights"] == theirs["weights"]


def test_checkpointing_keeps_a_fraction(figures: dict[str, dict[str, Any]]) -> None:
    assert figures["LoRA, checkpointing"]["kept"] < 0.2 * figures["LoRA"]["kept"]


def test_cached_text_frees_the_encoders_and_changes_nothing_else(figures: dict[str, dict[str, Any]]) -> None:
    """With text encoders in memory a step keeps not a byte more: no graph is built through them."""
    for name in ("LoRA", "LoRA, checkpointing"):
        cached, resident = figures[f"{name}, cached text"], figures[name]
        assert cached["kept"] == resident["kept"]
        assert resident["weights"] - cached["weights"] > 4 * 49408 * (32 + 64)  # two tables of tokens, at least


def test_operations_add_up_and_name_no_frozen_convolution(figures: dict[str, dict[str, Any]]) -> None:
    ours, theirs = figures["LoRA"]["operations"], figures["LoRA, torch's own layers"]["operations"]
    for name, operations in (("LoRA", ours), ("LoRA, torch's own layers", theirs)):
        # torch does not show its hooks the plain numbers of divisions, 8 bytes each
        assert sum(operations.values()) == pytest.approx(figures[name]["kept"], abs=500)
    assert any("Convolution" in name for name in theirs)
    assert not any("Conv" in name for name in ours)


def test_a_control_net_keeps_what_its_own_layers_need(figures: dict[str, dict[str, Any]]) -> None:
    """Of a toy the block that reads the pictures, which is not computed again, is about half of what is kept."""
    plain, checkpointing = figures["ControlNet, cached text"], figures["ControlNet, checkpointing, cached text"]
    assert plain["weights"] == checkpointing["weights"] == figures["LoRA, cached text"]["weights"]
    assert plain["kept"] > 0.5 * figures["LoRA"]["kept"]
    assert checkpointing["kept"] < 0.6 * plain["kept"]
