"""Loss weightings: check values, SNR 0, the relation of noise and velocity losses, and the order of factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.objective import Objective, velocity
from library.diffusion.schedule import make_schedule
from library.diffusion.weighting import WEIGHTINGS, loss_factors
from library.options import LossOptions, NoiseOptions

OFF = LossOptions()
NOISE = NoiseOptions()
TIMES = torch.tensor([0, 250, 500, 999])


def factors(settings: LossOptions, prediction: str = "epsilon", zero: bool = False) -> list[float]:
    found = loss_factors(TIMES, make_schedule(prediction, zero), settings)
    assert found is not None
    return found.tolist()


@pytest.mark.parametrize(
    ("settings", "prediction", "expected"),
    [
        (LossOptions(min_snr_gamma=5), "epsilon", [0.00425372, 1, 1, 1]),
        (LossOptions(min_snr_gamma=5), "v_prediction", [0.00425011, 0.6737923, 0.2763325, 0.00466009]),
        (
            LossOptions(scale_v_pred_loss_like_noise_pred=True),
            "v_prediction",
            [0.9990010, 0.6737923, 0.2763325, 0.0046601],
        ),
        (LossOptions(v_pred_like_loss=0.5), "epsilon", [1.5005, 1.7420684, 2.8094146, 108.29397]),
        (LossOptions(debiased_estimation_loss=True), "epsilon", [0.0316228, 0.6957994, 1.6182798, 14.614648]),
    ],
)
def test_check_values(settings: LossOptions, prediction: str, expected: list[float]) -> None:
    assert factors(settings, prediction) == pytest.approx(expected, rel=2e-6)


def test_nothing_active_is_no_factor() -> None:
    assert loss_factors(TIMES, make_schedule(), OFF) is None
    assert loss_factors(TIMES, make_schedule(), LossOptions(min_snr_gamma=0, v_pred_like_loss=0)) is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [names[0] for _, names in WEIGHTINGS])
def test_every_weighting_is_finite_at_zero_snr(name: str, prediction: str) -> None:
    every = torch.arange(1000)
    options = LossOptions(**{name: True if getattr(OFF, name) is False else 1})
    found = loss_factors(every, make_schedule(prediction, zero_terminal_snr=True), options)
    assert found is not None
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())
    plain = loss_factors(every, make_schedule(prediction), options)
    assert plain is not None
    assert found.max() <= plain.max() * 1.01  # the change of the schedule lets no weight explode


def test_weights_use_the_schedule_in_use() -> None:
    plain, zero = (factors(LossOptions(min_snr_gamma=1), "v_prediction", zero)[2] for zero in (False, True))
    assert plain == pytest.approx(0.2763325, rel=1e-5)
    assert zero == pytest.approx(0.24101855, rel=1e-5)


@given(st.integers(0, 999), st.integers(0, 2**31))
def test_debiased_weights_the_same_error_alike_as_noise_and_as_velocity(time: int, seed: int) -> None:
    """A model that predicts v is a model that predicts noise: the weighted loss of one error must be the same."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise, noise_hat = (torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    times = torch.tensor([time])
    plain, v = make_schedule("epsilon"), make_schedule("v_prediction")
    a = plain.alphas_cumprod_T.double()[times].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    latents_hat = (noisy - (1 - a).sqrt() * noise_hat) / a.sqrt()
    settings, one = LossOptions(debiased_estimation_loss=True), torch.ones(1)
    as_noise = Objective(NOISE, settings).weighted_losses(noise_hat, noise, times, one, plain)
    v_hat, v_true = (velocity(x, e, times, v) for x, e in ((latents_hat, noise_hat), (latents, noise)))
    as_velocity = Objective(NOISE, settings).weighted_losses(v_hat, v_true, times, one, v)
    if time > 5:  # below, SNR passes the cap of 1000
        torch.testing.assert_close(as_velocity, as_noise, rtol=2e-3, atol=0)


def test_sample_weights_scale_their_sample_only() -> None:
    schedule = make_schedule()
    pred, target = torch.zeros(3, 4, 8, 8), torch.ones(3, 4, 8, 8)
    weights = torch.tensor([1.0, 0.5, 0.0])
    losses = Objective(NOISE, OFF).weighted_losses(pred, target, torch.tensor([1, 2, 3]), weights, schedule)
    assert losses.tolist() == [1.0, 0.5, 0.0]


def test_factors_multiply() -> None:
    together = factors(LossOptions(min_snr_gamma=5, scale_v_pred_loss_like_noise_pred=True), "v_prediction")
    first = factors(LossOptions(min_snr_gamma=5), "v_prediction")
    second = factors(LossOptions(scale_v_pred_loss_like_noise_pred=True), "v_prediction")
    assert together == pytest.approx([a * b for a, b in zip(first, second, strict=True)])


def test_loss_is_in_float32_for_half_predictions() -> None:
    pred = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)  # its square is beyond float16
    losses = Objective(NOISE, OFF).weighted_losses(
        pred, torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.ones(1), make_schedule()
    )
    assert losses.item() == pytest.approx(90000.0)
