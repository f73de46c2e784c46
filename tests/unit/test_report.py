"""What is shown and logged of a run: the running average of the loss, skipped steps, validation."""

from __future__ import annotations

from typing import Any

import pytest

from library.training.clock import Clock
from library.training.loop import StepReport
from library.training.report import Reporter


class Bar:
    """Notes what the progress line was told."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []
        self.started_at = 0

    def advance(self, count: int, **values: Any) -> None:
        self.shown.append({"count": count, **values})

    def start_at(self, step: int) -> None:
        self.started_at = step


def reporter(window: int) -> tuple[Reporter, Bar, list[tuple[int, dict[str, float]]]]:
    bar, logged = Bar(), list[tuple[int, dict[str, float]]]()
    line: Any = bar
    work = Reporter(line, window, lambda: [("lr/unet", 0.1)], lambda scalars, step: logged.append((step, scalars)))
    return work, bar, logged


def steps(work: Reporter, losses: list[float], skipped: int | None = None) -> None:
    for index, loss in enumerate(losses):
        report = StepReport(loss=loss, keys=(), sample_count=2, grad_norm=3.0, was_skipped=index == skipped)
        work.after_step(Clock(9, 1, step=index + 1), report)


def test_the_average_is_that_of_the_last_steps() -> None:
    work, bar, logged = reporter(3)
    steps(work, [1.0, 2.0, 3.0, 7.0])
    assert [round(shown["avr_loss"], 6) for shown in bar.shown] == [1.0, 1.5, 2.0, 4.0]
    assert logged[-1] == (4, {"loss/current": 7.0, "loss/average": 4.0, "grad_norm": 3.0, "lr/unet": 0.1})
    work.after_epoch(Clock(9, 1, epoch=2, step=4))
    assert logged[-1] == (4, {"loss/epoch": 4.0, "epoch": 2.0})


def test_skipped_steps_are_counted_but_not_averaged() -> None:
    work, _, logged = reporter(3)
    steps(work, [1.0, float("nan"), 3.0], skipped=1)
    assert work.average == 2.0
    assert work.skipped_steps == 1
    assert logged[1][1]["loss/average"] == 1.0


def test_a_resumed_run_goes_on_with_its_average_and_its_validation() -> None:
    first, _, _ = reporter(3)
    steps(first, [1.0, 2.0, 3.0, 7.0])
    first.add_validation(2, {"loss/validation": 0.5})
    second, bar, _ = reporter(3)
    assert second.validated_at is None
    assert second.validation_line() is None
    second.restore(first.losses(), first.validation, 4)
    assert (second.average, bar.started_at, second.validated_at) == (first.average, 4, 2)
    second.add_validation(4, {"loss/validation": 0.25})
    second.add_validation(6, {"loss/validation": 0.75})
    assert second.validation_line() == ("validation loss 0.5000 at step 2, 0.7500 at step 6, lowest 0.2500 at step 4")
    steps(second, [11.0])
    assert second.average == pytest.approx((3 + 7 + 11) / 3)
