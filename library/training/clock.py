"""Where a run stands, and what is due there. Owns step, epoch and the place in the epoch: this is what resume
restores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Clock:
    """Position of a run, counted in optimizer steps.

    ``epoch`` is the epoch under way, from 1; ``step_in_epoch`` and ``step`` count finished optimizer steps.
    ``max_train_steps`` and ``num_epochs`` are the plan of the whole logical run, however often it is interrupted.
    """

    max_train_steps: int
    num_epochs: int
    epoch: int = 1
    step_in_epoch: int = 0
    step: int = 0

    @property
    def is_finished(self) -> bool:
        return self.step >= self.max_train_steps

    def advance(self) -> None:
        """One optimizer step is done."""
        self.step += 1
        self.step_in_epoch += 1

    def next_epoch(self) -> None:
        """The epoch is done; the clock stands at the first step of the next."""
        self.epoch += 1
        self.step_in_epoch = 0

    def position(self) -> dict[str, Any]:
        """Plain values for the state file."""
        return asdict(self)

    def seek(self, position: dict[str, Any]) -> None:
        """Stand where ``position`` says; the plan (totals) stays this run's own."""
        self.epoch, self.step_in_epoch, self.step = (int(position[k]) for k in ("epoch", "step_in_epoch", "step"))


def is_due(count: int, every_n: int | None) -> bool:
    """True if something that happens every n is due after ``count`` (never at 0, never without n)."""
    return bool(every_n) and count > 0 and count % every_n == 0  # type: ignore[operator]


def due_counts(total: int, every_n: int | None) -> range:
    """All counts up to ``total`` at which something that happens every n is due."""
    return range(every_n, total + 1, every_n) if every_n else range(0)
