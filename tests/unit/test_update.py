"""From gradients to weights: clipping, steps that are dropped, and numbers that are not finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.log import UserError
from library.training.guard import MAX_SKIPS_IN_A_ROW, FiniteGuard
from library.training.loop import StepReport
from library.training.update import WeightUpdate


class Bench:
    """An update of one weight (2,), whose gradient is (6, 8): a norm of 10."""

    def __init__(self, max_grad_norm: float = 0.0, scaler: Any = None, was_skipped: bool = False) -> None:
        self.weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.unscaled: list[Any] = []
        self.rates = 0
        optimizer = torch.optim.SGD([self.weight], lr=0.1)
        accelerator: Any = SimpleNamespace(
            scaler=scaler,
            optimizer_step_was_skipped=was_skipped,
            backward=lambda loss: loss.backward(),
            unscale_gradients=self.unscaled.append,
        )
        schedule = SimpleNamespace(step=self._count)
        self.update = WeightUpdate(accelerator, nn.Identity(), optimizer, schedule, [self.weight], max_grad_norm)
        self.update.backward((self.weight * torch.tensor([6.0, 8.0])).sum())

    def _count(self) -> None:
        self.rates += 1


@pytest.mark.parametrize(("limit", "gradient"), [(0.0, [6.0, 8.0]), (100.0, [6.0, 8.0]), (1.0, [0.6, 0.8])])
def test_the_norm_is_told_as_it_was_before_clipping(limit: float, gradient: list[float]) -> None:
    bench = Bench(limit)
    assert bench.update.total_norm() == pytest.approx(10)
    assert bench.weight.grad is not None
    assert bench.weight.grad.tolist() == pytest.approx(gradient)
    assert bench.update.apply()
    assert bench.weight.tolist() == pytest.approx([1 - 0.1 * one for one in gradient])
    assert bench.weight.grad is None
    assert bench.rates == 1


def test_scaled_gradients_are_unscaled_before_they_are_measured() -> None:
    bench = Bench(1.0, scaler=object())
    bench.update.total_norm()
    assert len(bench.unscaled) == 1


def test_the_schedule_waits_for_a_step_that_the_scaler_dropped() -> None:
    bench = Bench(was_skipped=True)
    assert not bench.update.apply()
    assert bench.rates == 0
    assert bench.weight.grad is None


def test_a_discarded_step_counts_and_leaves_nothing_behind() -> None:
    updates: list[int] = []
    bench = Bench(scaler=SimpleNamespace(update=lambda: updates.append(1)))
    bench.update.discard()
    assert bench.weight.tolist() == [1.0, 1.0]
    assert bench.weight.grad is None
    assert bench.rates == 1
    assert updates == [1]


# ---- numbers that are not finite

NAN = float("nan")


def report(loss: float = 1.0, grad_norm: float = 1.0) -> StepReport:
    return StepReport(loss=loss, keys=("a", "b", "a"), sample_count=3, grad_norm=grad_norm)


@pytest.mark.parametrize(("bad", "what"), [(report(loss=NAN), "loss"), (report(grad_norm=float("inf")), "gradient")])
def test_what_is_not_finite_stops_or_is_skipped(bad: StepReport, what: str) -> None:
    with pytest.raises(UserError, match=rf"the {what} is not finite .*: /a, /b; "):
        FiniteGuard("stop", has_scaler=False, path_of=lambda key: f"/{key}").is_good(bad)
    guard = FiniteGuard("skip", has_scaler=False)
    assert guard.is_good(report())
    assert not guard.is_good(bad)


def test_gradients_under_a_scaler_are_the_scalers_business() -> None:
    guard = FiniteGuard("stop", has_scaler=True)
    assert guard.is_good(report(grad_norm=float("inf")))
    with pytest.raises(UserError, match="loss"):
        guard.is_good(report(loss=NAN))


def test_only_skips_in_a_row_end_the_run() -> None:
    guard = FiniteGuard("skip", has_scaler=False)
    for _ in range(2):
        for _ in range(MAX_SKIPS_IN_A_ROW - 1):
            assert not guard.is_good(report(loss=NAN))
        assert guard.is_good(report())
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        guard.is_good(report(loss=NAN))
    with pytest.raises(UserError, match="10 steps in a row"):
        guard.is_good(report(loss=NAN))
