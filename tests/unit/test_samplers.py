"""Every sampler name on every kind of schedule: model calls, exactness on a model with a known answer, no clipping."""

from typing import get_args

import numpy as np
import pytest
import torch

from library.diffusion.schedule import NoiseSchedule, make_schedule
from library.generation.denoise import start_from
from library.generation.from_picture import keep_outside
from library.generation.multistep import multistep_coefficients
from library.generation.samplers import SAMPLER_NAMES, Sampler, make_sampler
from library.log import UserError
from library.options import saving

TWICE = {"heun", "dpm_2", "dpm_2_a", "k_dpm_2", "k_dpm_2_a"}
SCHEDULES = {
    "epsilon": make_schedule(),
    "v": make_schedule("v_prediction"),
    "zero terminal v": make_schedule("v_prediction", zero_terminal_snr=True),
}
ANSWER = torch.full((1, 4, 8, 8), 3.0)  # beyond -1..1: clipping would show


def perfect_prediction(noisy: torch.Tensor, timestep: torch.Tensor, schedule: NoiseSchedule) -> torch.Tensor:
    """What a model says that knows every picture to be ``ANSWER``; timesteps may lie between two whole ones."""
    ac = schedule.alphas_cumprod_T.double().clamp(min=2.0**-24).numpy()
    sigma = np.interp(float(timestep), np.arange(1000), ((1 - ac) / ac) ** 0.5)
    a, b = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
    noise = (noisy - a * ANSWER) / b
    return (a * noise - b * ANSWER if schedule.prediction_type == "v_prediction" else noise).float()


def draw(sampler: Sampler, schedule: NoiseSchedule) -> tuple[torch.Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * sampler.initial_scale
    for timestep in sampler.timesteps:
        noisy = sampler.model_input(latents, timestep)
        latents = sampler.step(perfect_prediction(noisy, timestep, schedule), timestep, latents, [generator])
    return latents, len(sampler.timesteps)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_perfect_model_is_drawn(name: str, kind: str) -> None:
    latents, calls = draw(make_sampler(name, 20, SCHEDULES[kind]), SCHEDULES[kind])
    assert calls == {"pndm": 21}.get(name, 39 if name in TWICE else 20)
    assert (latents - ANSWER).abs().max() < 0.2


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if not name.startswith("k_")])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_few_steps_are_refused_or_drawn(name: str, kind: str) -> None:
    drawn = 0
    for steps in (1, 2, 3, 4):
        try:
            sampler = make_sampler(name, steps, SCHEDULES[kind])
        except UserError:
            assert drawn == 0
            continue
        drawn += 1
        assert float(sampler.timesteps[0]) > 400  # it begins where the picture is noise
        assert bool(draw(sampler, SCHEDULES[kind])[0].isfinite().all())
    assert drawn > 0


def test_refusals() -> None:
    with pytest.raises(UserError, match="at least 2"):
        make_sampler("pndm", 1, SCHEDULES["epsilon"])
    with pytest.raises(UserError, match="euler_a"):
        make_sampler("eulr", 10, SCHEDULES["epsilon"])


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++", "pndm", "heun", "lms"])
def test_zero_terminal_sampling_begins_at_the_last_timestep(name: str) -> None:
    assert float(make_sampler(name, 10, SCHEDULES["zero terminal v"]).timesteps[0]) == 999


def test_timesteps_of_the_specification() -> None:
    plain = SCHEDULES["epsilon"]
    assert make_sampler("ddim", 50, plain).timesteps[:3].tolist() == [981, 961, 941]
    assert make_sampler("euler", 20, plain).timesteps[1].item() == pytest.approx(946.42, abs=0.01)
    assert make_sampler("dpmsolver++", 20, plain).timesteps[[0, 1, -1]].tolist() == [999, 949, 50]


def test_last_levels_of_the_specification() -> None:
    """DDIM ends without noise, PNDM at the first timestep's, whatever a model's folder says of its sampler."""
    plain = SCHEDULES["epsilon"]
    assert float(make_sampler("ddim", 5, plain).scheduler.final_alpha_cumprod) == 1
    assert float(make_sampler("pndm", 5, plain).scheduler.final_alpha_cumprod) == pytest.approx(0.99915)


def test_names_are_those_of_the_option() -> None:
    assert set(SAMPLER_NAMES) == set(get_args(saving.Sampler))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_multistep_integrates_polynomials_exactly(order: int) -> None:
    sigmas = np.array([14.0, 9.0, 5.0, 3.0, 2.0])
    coefficients = multistep_coefficients(sigmas, 3, order)
    for degree in range(order):
        derivatives = sigmas[3 - np.arange(order)] ** degree
        exact = (sigmas[4] ** (degree + 1) - sigmas[3] ** (degree + 1)) / (degree + 1)
        assert np.dot(coefficients, derivatives) == pytest.approx(exact)


# ---- beginning in the middle


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if not name.startswith("k_")])
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_beginning_from_a_picture(name: str, strength: float) -> None:
    """The noise has the level that the first call removes, as many steps are taken as asked, and the end is reached."""
    schedule = SCHEDULES["epsilon"]
    sampler = make_sampler(name, 20, schedule)
    first = sampler.first_call(strength)
    sampler.begin_at(first)
    calls = sampler.timesteps[first:]
    steps = int(20 * strength)
    assert len(calls) == (2 * steps - 1 if name in TWICE else steps + (name == "pndm" and steps > 1))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = sampler.add_noise(ANSWER, noise, first)
    guesses: list[float] = []
    for timestep in calls:
        noisy = sampler.model_input(latents, timestep)
        pred = perfect_prediction(noisy, timestep, schedule)
        guesses.append(float((pred - noise).abs().max()))
        latents = sampler.step(pred, timestep, latents, [torch.Generator().manual_seed(1)])
    assert guesses[0] < 1e-2  # a model that knows the picture finds just this noise: the levels agree
    assert (latents - ANSWER).abs().max() < 0.2


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if not name.startswith("k_")])
def test_strength_zero_takes_no_step(name: str) -> None:
    sampler = make_sampler(name, 20, SCHEDULES["epsilon"])
    noise = torch.randn(1, 4, 8, 8)
    latents, first = start_from(sampler, ANSWER, noise, 0.0)
    assert first == len(sampler.timesteps)
    assert torch.equal(latents, ANSWER)


def test_levels_after_the_steps_fall_to_nothing() -> None:
    """What inpainting adds to the kept parts after each call is the level at which the next call begins."""
    for name in ("ddim", "pndm", "euler", "heun", "dpmsolver++", "lms"):
        sampler = make_sampler(name, 10, SCHEDULES["epsilon"])
        zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        levels = [float(sampler.add_noise(zero, one, call)) for call in range(len(sampler.timesteps) + 1)]
        assert levels == sorted(levels, reverse=True)
        assert levels[-1] == 0
        ac = SCHEDULES["epsilon"].alphas_cumprod_T.double().numpy()
        for timestep, level in zip(sampler.timesteps.tolist(), levels, strict=False):
            sigma = np.interp(timestep, np.arange(1000), ((1 - ac) / ac) ** 0.5)
            is_kept = name in ("ddim", "pndm", "dpmsolver++")
            assert level == pytest.approx(sigma / (1 + sigma**2) ** 0.5 if is_kept else sigma, rel=1e-3)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_kept_parts_of_a_picture_take_part_at_levels_that_the_sampler_has(name: str) -> None:
    """With a perfect model they are always where the sampler is; between two levels nobody touches them."""
    schedule = SCHEDULES["epsilon"]
    sampler = make_sampler(name, 5, schedule)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    keep = keep_outside(sampler, torch.zeros(1, 1, 8, 8), ANSWER, noise)
    latents = sampler.add_noise(ANSWER, noise, 0)
    for call, timestep in enumerate(sampler.timesteps):
        noisy = sampler.model_input(latents, timestep)
        latents = sampler.step(perfect_prediction(noisy, timestep, schedule), timestep, latents, [])
        kept = keep(latents, call)
        torch.testing.assert_close(kept, latents, atol=2e-3, rtol=2e-3)
        assert (kept is latents) == (name == "dpm_2" and call % 2 == 0 and call + 1 < len(sampler.timesteps))
