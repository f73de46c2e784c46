"""The ``modelspec.*`` metadata of saved files (Stability AI's model metadata standard, version 1.0.0)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CHECKPOINT_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
TITLES = {
    "lora": "LoRA",
    "textual-inversion": "TextualInversion",
    "control-net": "ControlNet",
    "control-net-lllite": "ControlNetLLLite",
    "": "Checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class Modelspec:
    """What is known of a file. ``kind`` is the suffix of the architecture: a key of ``TITLES``.

    ``resolution`` is (width, height) in pixels. Fields that are None are left out of the file.
    """

    architecture: str
    resolution: tuple[int, int]
    kind: str = ""
    implementation: str = CHECKPOINT_IMPLEMENTATION
    title: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    merged_from: Sequence[str] | None = None
    v_prediction: bool | None = None
    timesteps: tuple[int | None, int | None] = (None, None)
    clip_skip: int | None = None

    def as_metadata(self, now: float | None = None) -> dict[str, str]:
        """The metadata entries. ``now`` in Unix seconds; by default SOURCE_DATE_EPOCH if it is set, else the clock."""
        moment = current_time() if now is None else now
        low, high = self.timesteps
        entries = {
            "sai_model_spec": "1.0.0",
            "architecture": self.architecture + (f"/{self.kind}" if self.kind else ""),
            "implementation": self.implementation,
            "title": self.title or f"{TITLES.get(self.kind, 'Checkpoint')}@{float(moment)}",
            "resolution": f"{self.resolution[0]}x{self.resolution[1]}",
            "author": self.author,
            "description": self.description,
            "license": self.license,
            "tags": self.tags,
            "merged_from": ", ".join(self.merged_from) if self.merged_from else None,
            "date": _date(moment),
            "prediction_type": None if self.v_prediction is None else prediction_word(self.v_prediction),
            "timestep_range": None if low is None and high is None else f"{_or(low, 0)},{_or(high, 1000)}",
            "encoder_layer": None if self.clip_skip is None else str(self.clip_skip),
        }
        return {f"modelspec.{name}": value for name, value in entries.items() if value is not None}


def prediction_word(is_velocity: bool) -> str:
    """How ``modelspec.prediction_type`` calls what a model predicts."""
    return "v" if is_velocity else "epsilon"


def current_time() -> float:
    """Unix seconds: SOURCE_DATE_EPOCH if it is set (files can then be byte-identical), else the clock."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return float(fixed) if fixed.isdigit() else time.time()


def title_of(metadata: Mapping[str, str], stem: str) -> str:
    """How a merged file names one of its sources: its title, else its file stem."""
    return metadata.get("modelspec.title") or stem


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _date(moment: float) -> str:
    """ISO 8601 without fraction and zone: local time, or UTC where the time is fixed from outside."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "").isdigit()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment) if fixed else time.localtime(moment))
