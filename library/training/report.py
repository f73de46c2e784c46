"""Effect: progress line, scalars for trackers, and the running average of the loss."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from library.log import Progress
from library.training.clock import Clock
from library.training.loop import StepReport

logger = logging.getLogger(__name__)
Scalars = dict[str, float]


class Reporter:
    """Shows and logs each step. The average is over the last ``window`` steps: an epoch's worth."""

    def __init__(
        self,
        bar: Progress[int],
        window: int,
        learning_rates: Callable[[], list[tuple[str, float]]],
        log: Callable[[Scalars, int], None],
    ) -> None:
        self._bar = bar
        self._learning_rates = learning_rates
        self._log = log
        self._losses: deque[float] = deque(maxlen=max(1, window))
        self.validation: list[tuple[int, float]] = []  # optimizer step, loss
        self.skipped_steps = 0

    @property
    def average(self) -> float:
        """Mean loss of the window; 0 before the first step."""
        return sum(self._losses) / len(self._losses) if self._losses else 0.0

    def losses(self) -> list[float]:
        """For the state file."""
        return list(self._losses)

    @property
    def validated_at(self) -> int | None:
        """The step of the last validation; None before the first."""
        return self.validation[-1][0] if self.validation else None

    def add_validation(self, step: int, scalars: Scalars) -> None:
        """Show and log the loss on held-out images, ``loss/validation`` and what else there is."""
        self.validation.append((step, scalars["loss/validation"]))
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
        self._log(scalars, step)

    def validation_line(self) -> str | None:
        """What became of the loss on held-out images; None if it was never measured."""
        if not self.validation:
            return None
        (first_step, first), (last_step, last) = self.validation[0], self.validation[-1]
        best_step, best = min(self.validation, key=lambda item: item[1])
        return (
            f"validation loss {first:.4f} at step {first_step}, {last:.4f} at step {last_step},"
            f" lowest {best:.4f} at step {best_step}"
        )

    def restore(self, losses: list[float], validation: list[tuple[int, float]], step: int) -> None:
        """Go on from a state."""
        self._losses.extend(losses)
        self.validation = validation
        self._bar.start_at(step)

    def after_step(self, clock: Clock, report: StepReport) -> None:
        self.skipped_steps += report.was_skipped
        if not report.was_skipped:
            self._losses.append(report.loss)
        shown = {"avr_loss": self.average}
        if "max_norm/keys_scaled" in report.scalars:
            shown["Keys Scaled"] = report.scalars["max_norm/keys_scaled"]
            shown["Average key norm"] = report.scalars["max_norm/average_key_norm"]
        self._bar.advance(1, images=report.sample_count, **shown)
        scalars = {"loss/current": report.loss, "loss/average": self.average, "grad_norm": report.grad_norm}
        self._log({**scalars, **report.scalars, **dict(self._learning_rates())}, clock.step)

    def after_epoch(self, clock: Clock) -> None:
        self._log({"loss/epoch": self.average, "epoch": float(clock.epoch)}, clock.step)
