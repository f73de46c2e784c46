"""Short training runs whose steps can be looked at: what `tests/training/test_cells*.py` share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from torch import Tensor

from library.training import loop
from library.training.loop import StepReport
from tests.training.runs import SCRIPT, SDXL_SCRIPT, metadata, tensors, train

STEPS = 3
# One cell of 64 px images is left in the middle block: attention over one token does not depend on query and key, so
# these layers move by rounding errors or not at all.
BLIND_AT_64_PX = {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{part}" for part in "qk"}
# SDXL's U-Net takes the states below the first text encoder's last layer: below the toy's second.
UNREACHED_IN_SDXL = "lora_te1_text_model_encoder_layers_1_"
# One fewer than SD 1.5's 278: two of the toy's levels are of one width, so a block between them has no shortcut.
UNET_LAYERS, UNET_LAYERS_WITH_CONVOLUTIONS, TEXT_LAYERS = 192, 277, 12


@dataclass(frozen=True)
class Outcome:
    """What a run did and wrote."""

    file: Path
    reports: list[StepReport]

    @property
    def losses(self) -> list[float]:
        """One for each optimizer step."""
        return [report.loss for report in self.reports]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Of the saved file."""
        return tensors(self.file)

    @property
    def metadata(self) -> dict[str, str]:
        """Of the saved file."""
        return metadata(self.file)

    @property
    def modules(self) -> set[str]:
        """Names of the layers in the saved file."""
        return {key.partition(".")[0] for key in self.tensors}

    @property
    def unmoved(self) -> set[str]:
        """Names of the layers whose LoRA changes nothing although it could."""
        ups = {key: tensor for key, tensor in self.tensors.items() if key.endswith(".lora_up.weight")}
        assert ups
        names = {key.partition(".")[0] for key, up in ups.items() if not bool(up.any())}
        return {name for name in names - BLIND_AT_64_PX if not name.startswith(UNREACHED_IN_SDXL)}

    def count(self, prefix: str) -> int:
        """How many layers of the file have a name that begins so."""
        return sum(name.startswith(prefix) for name in self.modules)


class StepReports:
    """What the loop says of each optimizer step of the runs that follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[StepReport] = []
        original = loop.train_step

        def train_step(*arguments):
            report = original(*arguments)
            self.all.append(report)
            return report

        monkeypatch.setattr(loop, "train_step", train_step)

    def check(self, steps: int) -> None:
        """So many steps, none skipped, each with a finite loss above 0."""
        assert len(self.all) == steps
        assert not any(report.was_skipped for report in self.all)
        assert all(math.isfinite(report.loss) and report.loss > 0 for report in self.all)


class Runner:
    """Trains for a few steps and collects each step's report; every run must end well with finite numbers.

    ``models``: the toys by family; the first is the usual one.
    """

    def __init__(self, folder: Path, models: dict[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._models, self._photos = folder, models, photos
        self._reports = StepReports(monkeypatch)
        self._count = 0

    def __call__(
        self,
        *more: str,
        family: str | None = None,
        data: Path | None = None,
        steps: int = STEPS,
        suffix: str = "safetensors",
    ) -> Outcome:
        self._reports.all = []
        self._count += 1
        out = self._folder / f"run{self._count}"
        family = family or next(iter(self._models))
        given = (*(("--v2",) if family == "sd2" else ()), "--max_train_steps", str(steps), *more)
        script = SDXL_SCRIPT if family == "sdxl" else SCRIPT
        assert train(self._models[family], data or self._photos, out, *given, script=script) == 0
        outcome = Outcome(out / f"toy.{suffix}", list(self._reports.all))
        self._reports.check(steps)
        if suffix == "safetensors":
            assert outcome.metadata.get("ss_steps", str(steps)) == str(steps)
            assert all(bool(tensor.isfinite().all()) for tensor in outcome.tensors.values())
        return outcome
