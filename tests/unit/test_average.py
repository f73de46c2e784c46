"""The average of the weights: its closed formula, its place beside the weights, its way through a state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from library.log import UserError
from library.options import EmaOptions
from library.training.average import WeightAverage, make_average
from library.training.clock import Clock
from library.training.loop import StepReport

CLOCK = Clock(max_train_steps=9, num_epochs=1)


def report(was_skipped: bool = False) -> StepReport:
    return StepReport(loss=0.0, keys=(), sample_count=1, grad_norm=0.0, was_skipped=was_skipped)


def closed_formula(values: list[float], decay: float) -> float:
    """Each value with its weight: (1 - d_n) times all later d, the first with all of them."""
    kept = [min(decay, (1 + n) / (10 + n)) for n in range(1, len(values))]
    total = 0.0
    for index, value in enumerate(values):
        weight = 1.0 if index == 0 else 1 - kept[index - 1]
        for later in kept[index:]:
            weight *= later
        total += weight * value
    return total


def follow(values: list[float], decay: float, dtype: torch.dtype = torch.float32) -> tuple[WeightAverage, nn.Parameter]:
    weight = nn.Parameter(torch.tensor([values[0]], dtype=dtype))
    average = WeightAverage([weight], decay)
    for value in values[1:]:
        weight.data.fill_(value)
        average.after_step(CLOCK, report())
    return average, weight


def value_in_use(average: WeightAverage, weight: nn.Parameter) -> float:
    with average.in_use():
        return weight.item()


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.floats(0.01, 0.9999))
def test_closed_formula(values: list[float], decay: float) -> None:
    average, weight = follow(values, decay)
    assert value_in_use(average, weight) == pytest.approx(closed_formula(values, decay), rel=1e-4, abs=1e-3)
    assert weight.item() == pytest.approx(values[-1])


def test_steps_too_small_for_bf16_add_up() -> None:
    """An average held in bf16 would stay at 1: each update moves it by less than half a unit in the last place."""
    average, weight = follow([1.0] * 101 + [1.0078125] * 30, 0.9, torch.bfloat16)
    assert value_in_use(average, weight) == 1.0078125


def test_the_weights_come_back_bit_for_bit_and_types_stay() -> None:
    weights = [nn.Parameter(torch.randn(5, 3).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    average = WeightAverage(weights, 0.9)
    for weight in weights:
        weight.data.add_(1)
    average.after_step(CLOCK, report())
    before = [weight.detach().clone() for weight in weights]
    in_use = average.in_use()
    in_use.__enter__()
    assert not any(torch.equal(weight, former) for weight, former in zip(weights, before, strict=True))
    in_use.__exit__(RuntimeError, RuntimeError("drawing failed"), None)
    assert all(torch.equal(weight, former) for weight, former in zip(weights, before, strict=True))
    assert [weight.dtype for weight in weights] == [torch.float32, torch.bfloat16]


def test_skipped_steps_count_for_nothing() -> None:
    average, weight = follow([1.0, 2.0], 0.9)
    expected = value_in_use(average, weight)
    average.after_step(CLOCK, report(was_skipped=True))
    assert value_in_use(average, weight) == expected


def test_state_goes_on_and_none_begins_anew() -> None:
    average, weight = follow([1.0, 5.0, 2.0], 0.9)
    other = WeightAverage([weight], 0.9)
    other.load_state_dict(average.state_dict())
    weight.data.fill_(7.0)
    for one in (average, other):
        one.after_step(CLOCK, report())
    assert value_in_use(other, weight) == value_in_use(average, weight) != 7.0
    other.load_state_dict(None)
    assert value_in_use(other, weight) == 7.0


def test_off_and_refused() -> None:
    assert make_average(EmaOptions(), [], optimizer_averages=True) is None
    assert make_average(EmaOptions(ema_decay=0), [], optimizer_averages=False) is None
    with pytest.raises(UserError, match="schedule-free"):
        make_average(EmaOptions(ema_decay=0.9), [], optimizer_averages=True)
    for wrong in (-0.1, 1.0, 1.5):
        with pytest.raises(UserError, match="ema_decay"):
            EmaOptions(ema_decay=wrong)
