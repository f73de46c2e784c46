"""How much space the files of a run take, told before they are written."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from library.device import save_dtype
from library.options import EmaOptions, SaveOptions
from library.options.settings import Settings
from library.training.clock import Clock
from library.training.preflight import free_bytes
from library.training.saving import SavePlan
from library.training.trainable import Trainable

logger = logging.getLogger(__name__)
_MOMENTS = 3  # weight and two moments of an Adam-like optimizer, each in float32


def output_bytes(settings: Settings, trainable: Trainable, clock: Clock) -> dict[str, int]:
    """About the largest size that models and states have together at any time, in bytes by kind."""
    save = settings[SaveOptions]
    plan = SavePlan.of(save, clock.num_epochs)
    learnt = sum(parameter.numel() for parameter in trainable.trained_parameters())
    width = (save_dtype(save.save_precision) or torch.float32).itemsize
    models = _kept(plan.epoch_saves(clock.num_epochs), plan.keep_epochs)
    models += _kept(plan.step_saves(clock.max_train_steps), plan.keep_steps, plan.every_n_steps) + 1
    states = (models - 1 if plan.with_state else 0) + plan.state_at_end
    averages = 1 if settings[EmaOptions].ema_decay else 0
    return {
        "models": models * (1 + averages) * trainable.saved_numbers() * width,
        "states": states * learnt * 4 * (_MOMENTS + averages),
    }


def warn_of_full_disk(settings: Settings, trainable: Trainable, clock: Clock) -> None:
    """A warning if the files of the run will probably not fit: better now than at the end."""
    folder = settings[SaveOptions].output_dir
    needed, free = sum(output_bytes(settings, trainable, clock).values()), free_bytes(str(folder))
    if needed > free:
        sizes = f"its files need about {megabytes(needed)}, {megabytes(free)} are free"
        logger.warning("--output_dir %s: %s; free some space, or save less often", folder, sizes)


def megabytes(size: int) -> str:
    """A size in bytes as text."""
    return f"{size / 1e6:,.1f} MB"


def _kept(saves: Sequence[int], keep_n: int | None, every_n: int | None = None) -> int:
    """How many of the saved files exist at once."""
    if keep_n is None:
        return len(saves)
    return min(len(saves), keep_n if every_n is None else keep_n // every_n + 1)
