"""Watches losses and gradients: a number that is not finite never reaches the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from library.log import UserError

if TYPE_CHECKING:
    from library.training.loop import StepReport

logger = logging.getLogger(__name__)
MAX_SKIPS_IN_A_ROW = 10  # more than a bad batch: the run itself has gone wrong


class FiniteGuard:
    """Decides what happens to a step whose loss or gradient is not finite.

    ``on_nan``: "stop" raises UserError, "skip" drops the step. With a gradient scaler (fp16) an overflowing gradient
    is the scaler's own business, so only the loss is looked at there. ``path_of`` gives an image's file by its key.
    """

    def __init__(self, on_nan: Literal["stop", "skip"], has_scaler: bool, path_of: Callable[[str], str] = str) -> None:
        self._on_nan = on_nan
        self._has_scaler = has_scaler
        self._path_of = path_of
        self._in_a_row = 0

    def is_good(self, report: StepReport) -> bool:
        """True if the step may change the weights."""
        if math.isfinite(report.loss) and (self._has_scaler or math.isfinite(report.grad_norm)):
            self._in_a_row = 0
            return True
        what = "gradient" if math.isfinite(report.loss) else "loss"
        files = ", ".join(self._path_of(key) for key in dict.fromkeys(report.keys))
        if self._on_nan == "stop":
            raise UserError(
                f"the {what} is not finite in the step of these images: {files}; no such number reached the weights. "
                "Lower the learning rate, look at the images, or drop such steps with --on_nan skip"
            )
        self._in_a_row += 1
        logger.warning("the %s is not finite: step skipped; images: %s", what, files)
        if self._in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise UserError(f"{self._in_a_row} steps in a row had a {what} that is not finite: the run cannot go on")
        return False
