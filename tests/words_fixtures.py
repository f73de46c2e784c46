"""Runs of textual inversion on toy models: what their tests share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.options.scripts import (
    SDXL_TRAIN_TEXTUAL_INVERSION,
    TRAIN_TEXTUAL_INVERSION,
    TRAIN_TEXTUAL_INVERSION_XTI,
)
from library.training import setup
from library.training.prepare import Models
from library.training.script import Script
from tests.training import runs

_KIND = "library.training.kinds.embedding:EmbeddingTraining"
SD = Script(TRAIN_TEXTUAL_INVERSION, kind=_KIND, tracker_name="textual_inversion")
SDXL = Script(SDXL_TRAIN_TEXTUAL_INVERSION, kind=_KIND, tracker_name="textual_inversion")
XTI = Script(
    TRAIN_TEXTUAL_INVERSION_XTI,
    kind="library.training.kinds.embedding:LayerEmbeddingTraining",
    tracker_name="textual_inversion",
)
SCRIPTS = {"sd1": SD, "sd2": SD, "sdxl": SDXL, "xti": XTI, "xti2": XTI}
FAMILIES = {"xti": "sd1", "xti2": "sd2"}
SGD = ("--optimizer_type", "SGD", "--max_grad_norm", "0", "--max_train_steps", "2")


def write_pictures(folder: Path, count: int = 4, word: str = "sksx") -> Path:
    """Photos whose captions hold the new word."""
    photos = runs.write_photos(folder, [(64, 64)] * count)
    for index, file in enumerate(sorted(photos.rglob("*.caption"))):
        file.write_text(f"a photo of {word}, number {index}")
    return photos


class Trainer:
    """Trains words on the toys (``models`` by family) and tells of the models that the last run turned over."""

    def __init__(self, folder: Path, models: Mapping[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._models, self._photos = folder, models, photos
        self._count = 0
        self.loaded: Models | None = None
        original = setup.load_models

        def load_models(*arguments):
            self.loaded = original(*arguments)
            return self.loaded

        monkeypatch.setattr(setup, "load_models", load_models)

    def command(self, kind: str, out: Path, *more: str, data: Path | None = None) -> list[str]:
        """The command line of a run; ``more`` wins."""
        family = FAMILIES.get(kind, kind)
        given = ("--token_string", "sksx", "--save_model_as", "safetensors", "--learning_rate", "0.05")
        given += ("--v2",) if family == "sd2" else ()
        return runs.command(self._models[family], data or self._photos, out, *given, *more, script=SCRIPTS[kind])

    def run(self, kind: str, *more: str, data: Path | None = None, out: Path | None = None) -> tuple[int, Path]:
        """Exit status, and the folder that was written to."""
        self._count += 1
        out = out or self._folder / f"run{self._count}"
        words = self.command(kind, out, *more, data=data)
        runs.AcceleratorState._reset_state(reset_partial_state=True)
        return runs.run(SCRIPTS[kind], words), out

    def __call__(self, kind: str, *more: str, data: Path | None = None) -> dict[str, Tensor]:
        """The tensors of the saved file of a run that must end well, all finite."""
        status, out = self.run(kind, *more, data=data)
        assert status == 0
        saved = runs.tensors(out / "toy.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
        return saved


def vocabulary(models: Models) -> list[Tensor]:
    """The token tables of the text encoders."""
    return [encoder.get_input_embeddings().weight for encoder in models.parts.text_encoders]  # type: ignore[operator]


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Euclidean distance of all tensors together."""
    assert one.keys() == other.keys()
    return float(torch.cat([(one[key] - other[key]).float().flatten() for key in one]).norm())
