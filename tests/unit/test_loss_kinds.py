"""Kinds of loss: written-out numbers, their limits, gradients, and one threshold for each image."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.loss_kinds import errors, huber_thresholds
from library.diffusion.objective import Objective
from library.diffusion.schedule import make_schedule
from library.options import LossOptions, NoiseOptions

SCHEDULE = make_schedule()
TIMES = torch.tensor([0, 250, 500, 999])
WIDE = torch.linspace(-3, 3, 25).view(1, 1, 5, 5).expand(4, 1, 5, 5)
ZERO = torch.zeros_like(WIDE)


@dataclass(frozen=True)
class Kind:
    loss_type: str = "huber"
    huber_schedule: str = "constant"
    huber_c: float = 0.1
    huber_scale: float = 1.0


def single(difference: float, kind: Kind) -> float:
    pred = torch.full((1, 1, 1, 1), difference)
    return errors(pred, torch.zeros(1, 1, 1, 1), TIMES[:1], SCHEDULE, kind).item()


@pytest.mark.parametrize(
    ("kind", "difference", "expected"),
    [
        (Kind("l2"), -3.0, 9.0),
        (Kind("l1"), -3.0, 3.0),
        (Kind("huber", huber_c=1.0), 0.75, 2 * (1.25 - 1)),
        (Kind("huber", huber_c=0.4), -0.3, 2 * 0.4 * (0.5 - 0.4)),
        (Kind("huber", huber_c=0.2, huber_scale=2.0), -0.3, 2 * 0.4 * (0.5 - 0.4)),
        (Kind("smooth_l1", huber_c=0.4), 0.3, 2 * (0.5 - 0.4)),
    ],
)
def test_written_out(kind: Kind, difference: float, expected: float) -> None:
    assert single(difference, kind) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1]),
        ("exponential", [1.0, 0.1**0.25, 0.1**0.5, 0.1**0.999]),
        # 0.9 / (1 + sigma)^2 + 0.1 with sigma = 1 / sqrt(snr): snr 1175.44055, 2.0655317, 0.38185, 0.00468191
        ("snr", [0.9497093, 0.4129634, 0.2312836, 0.1036913]),
    ],
)
def test_thresholds_of_each_sample(schedule: str, expected: list[float]) -> None:
    kind = Kind(huber_schedule=schedule)
    assert huber_thresholds(TIMES, SCHEDULE, kind).tolist() == pytest.approx(expected, rel=2e-5)
    doubled = huber_thresholds(TIMES, SCHEDULE, Kind(huber_schedule=schedule, huber_scale=2))
    assert doubled.tolist() == pytest.approx([2 * c for c in expected], rel=2e-5)


def test_pure_noise_has_the_lowest_threshold() -> None:
    zero = make_schedule("v_prediction", zero_terminal_snr=True)
    assert huber_thresholds(TIMES[-1:], zero, Kind(huber_schedule="snr")).item() == pytest.approx(0.1)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=6), st.sampled_from(["exponential", "snr"]))
def test_a_sample_does_not_see_the_others(times: list[int], schedule: str) -> None:
    """One threshold for a whole batch, and with it one timestep, was the reference's mistake."""
    kind = Kind(huber_schedule=schedule)
    pred = torch.randn(len(times), 4, 3, 3, generator=torch.Generator().manual_seed(1))
    together = errors(pred, torch.zeros_like(pred), torch.tensor(times), SCHEDULE, kind)
    for index, time in enumerate(times):
        alone = errors(pred[index : index + 1], torch.zeros(1, 4, 3, 3), torch.tensor([time]), SCHEDULE, kind)
        torch.testing.assert_close(alone[0], together[index])


def test_limits() -> None:
    def found(loss_type: str, c: float) -> torch.Tensor:
        return errors(WIDE, ZERO, TIMES, SCHEDULE, Kind(loss_type, huber_c=c))

    square, size = WIDE**2, WIDE.abs()
    torch.testing.assert_close(found("huber", 1e3), square, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found("huber", 1e-4) / 1e-4, 2 * size, rtol=1e-3, atol=2.1e-4)
    torch.testing.assert_close(found("smooth_l1", 1e-4), 2 * size, rtol=1e-3, atol=2.1e-4)
    torch.testing.assert_close(found("smooth_l1", 1e3) * 1e3, square, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("c", [1e-12, 0.1, 1e3])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_gradients(loss_type: str, c: float) -> None:
    """2 d / sqrt(d^2 + c^2), times c for huber: finite and 0 where there is no difference."""
    pred = WIDE.clone().requires_grad_()
    errors(pred, ZERO, TIMES, SCHEDULE, Kind(loss_type, huber_c=c)).sum().backward()
    used = max(c, 1e-6)
    expected = 2 * WIDE / (WIDE**2 + used**2).sqrt() * (used if loss_type == "huber" else 1)
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_half_precision_is_computed_in_float32(loss_type: str) -> None:
    pred = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)  # its square overflows fp16
    found = errors(pred, torch.zeros_like(pred), TIMES[:1], SCHEDULE, Kind(loss_type))
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())


def test_weightings_multiply_any_kind() -> None:
    options = LossOptions(loss_type="huber"), LossOptions(loss_type="huber", min_snr_gamma=5)
    one, other = (Objective(NoiseOptions(), each) for each in options)
    plain = one.weighted_losses(WIDE, ZERO, TIMES, torch.ones(4), SCHEDULE)
    weighted = other.weighted_losses(WIDE, ZERO, TIMES, torch.tensor([1.0, 1.0, 0.5, 0.0]), SCHEDULE)
    torch.testing.assert_close(weighted / plain, torch.tensor([0.00425372, 1.0, 0.5, 0.0]), rtol=1e-5, atol=0)
