"""The toy model and photos that the training tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from library.training import loop
from tests.lllite_fixtures import Pairs, write_begun
from tests.toy import write_toy_checkpoint
from tests.training.bench import Bench, make_bench
from tests.training.runs import write_pairs, write_photos


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A toy SD1 checkpoint."""
    return write_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy.safetensors")


@pytest.fixture(scope="session")
def model_sd2(tmp_path_factory) -> Path:
    """A toy SD2 checkpoint."""
    return write_toy_checkpoint(tmp_path_factory.mktemp("model2") / "toy2.safetensors", "sd2")


@pytest.fixture(scope="session")
def model_sdxl(tmp_path_factory) -> Path:
    """A toy SDXL checkpoint."""
    return write_toy_checkpoint(tmp_path_factory.mktemp("model_xl") / "toy_xl.safetensors", "sdxl")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Four square photos with captions, in a DreamBooth folder."""
    return write_photos(tmp_path_factory.mktemp("photos"), [(64, 64)] * 4)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Pairs:
    """Four square images with conditioning pictures."""
    return Pairs(*write_pairs(tmp_path_factory.mktemp("pairs"), [(64, 64)] * 4))


@pytest.fixture(scope="session")
def begun(tmp_path_factory) -> Path:
    """A ControlNet-LLLite for the toy SDXL that does something."""
    return write_begun(tmp_path_factory.mktemp("begun") / "net.safetensors")


@pytest.fixture
def bench(tmp_path, model, model_sd2, photos, capsys, monkeypatch) -> Bench:
    """A bench for wrong input."""
    return make_bench(tmp_path, model, model_sd2, photos, capsys, monkeypatch)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of each optimizer step of the runs of a test."""
    found: list[float] = []
    original = loop.train_step

    def train_step(*arguments: Any) -> Any:
        report = original(*arguments)
        found.append(report.loss)
        return report

    monkeypatch.setattr(loop, "train_step", train_step)
    return found
