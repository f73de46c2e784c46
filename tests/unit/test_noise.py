"""Noise and timesteps are functions of the sample's seed; their distributions and the U-Net's input and target."""

from dataclasses import dataclass, replace

import pytest
import torch

from library.diffusion.noise import input_perturbation, pyramid_noise, sample_noise, sample_timesteps
from library.diffusion.objective import Objective
from library.diffusion.schedule import make_schedule
from library.options import LossOptions, NoiseOptions
from library.rng import stream, torch_stream


@dataclass(frozen=True)
class Settings:
    noise_offset: float | None = None
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    min_timestep: int | None = None
    max_timestep: int | None = None
    noise_offset_random_strength: bool = False
    ip_noise_gamma_random_strength: bool = False


PLAIN = Settings()
EVERYTHING = Settings(0.1, 0.05, 6, 0.5, 0.1, 100, 900)
LOSS = LossOptions()
SEEDS = (11, 22, 33)
LATENTS = torch.randn(3, 4, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_sample_does_not_depend_on_its_batch(settings: Settings, prediction: str) -> None:
    schedule = make_schedule(prediction)
    together = Objective(settings, LOSS).training_inputs(LATENTS, SEEDS, schedule)
    for index in (2, 0):
        alone = Objective(settings, LOSS).training_inputs(
            LATENTS[index : index + 1], SEEDS[index : index + 1], schedule
        )
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_[index])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_latents_are_noised_in_float32(dtype: torch.dtype) -> None:
    half = Objective(PLAIN, LOSS).training_inputs(LATENTS.to(dtype), SEEDS, make_schedule())
    full = Objective(PLAIN, LOSS).training_inputs(LATENTS.to(dtype).float(), SEEDS, make_schedule())
    assert half.noisy_BCHW.dtype == half.target_BCHW.dtype == torch.float32
    assert torch.equal(half.noisy_BCHW, full.noisy_BCHW)


def test_global_random_states_are_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    first, state = sample_noise(LATENTS, SEEDS, EVERYTHING), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(sample_noise(LATENTS, SEEDS, EVERYTHING), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_switching_one_kind_on_changes_no_other_draw() -> None:
    base = sample_noise(LATENTS, SEEDS, PLAIN)
    offset = sample_noise(LATENTS, SEEDS, Settings(noise_offset=0.1)) - base
    assert offset.std(dim=(2, 3)).max() < 1e-6  # one constant per sample and channel
    assert offset[:, :, 0, 0].unique().numel() == 12
    stronger = sample_noise(LATENTS, SEEDS, Settings(noise_offset=0.2)) - base
    torch.testing.assert_close(stronger, 2 * offset)
    assert torch.equal(sample_timesteps(SEEDS, PLAIN), sample_timesteps(SEEDS, Settings(noise_offset=0.1)))


def test_adaptive_scale_follows_the_channel_mean_and_not_below_zero() -> None:
    latents = torch.ones(3, 4, 8, 8) * torch.tensor([0.0, -2.0, 1.0]).view(3, 1, 1, 1)
    base = sample_noise(latents, SEEDS, PLAIN)
    constant = sample_noise(latents, SEEDS, Settings(noise_offset=1.0)) - base
    rising = sample_noise(latents, SEEDS, Settings(noise_offset=1.0, adaptive_noise_scale=0.5)) - base
    torch.testing.assert_close(rising, constant * torch.tensor([1.0, 2.0, 1.5]).view(3, 1, 1, 1), atol=1e-5, rtol=1e-4)
    falling = sample_noise(latents, SEEDS, Settings(noise_offset=1.0, adaptive_noise_scale=-0.8)) - base
    torch.testing.assert_close(falling, constant * torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1, 1), atol=1e-5, rtol=1e-4)


def test_pyramid_noise_has_deviation_one_per_sample_and_more_coarse_share() -> None:
    white = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    pyramid = pyramid_noise(white, 5, iterations=8, discount=0.8)
    assert pyramid.std().item() == pytest.approx(1, abs=1e-5)

    def coarse(noise: torch.Tensor) -> float:
        return torch.nn.functional.avg_pool2d(noise, 16).std().item()

    assert coarse(pyramid) > 3 * coarse(white)
    # level 0 is a second draw at full size with weight 1; normalised, one level is white noise again
    assert coarse(pyramid_noise(white, 5, iterations=1, discount=0.8)) < 2 * coarse(white)


def test_levels_of_pyramid_noise_count_by_powers_of_the_discount() -> None:
    white = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(0))
    ratios, generator = stream(5, "multires_ratio"), torch_stream(5, "multires_noise")
    total = white
    for weight, power in ((1.0, 0), (0.5, 1), (0.25, 2)):
        side = int(32 / (2 + 2 * ratios.random()) ** power)
        coarse = torch.randn(1, 4, side, side, generator=generator)
        total = total + weight * torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(pyramid_noise(white, 5, iterations=3, discount=0.5), total / total.std())


@pytest.mark.parametrize(("low", "high"), [(None, None), (100, 200), (0, 1), (None, 3), (999, None)])
def test_timesteps_stay_in_their_range_and_fill_it(low: int | None, high: int | None) -> None:
    timesteps = sample_timesteps(range(3000), Settings(min_timestep=low, max_timestep=high))
    first, last = low or 0, (high or 1000) - 1
    assert timesteps.dtype == torch.int64
    assert first <= timesteps.min() <= first + 5
    assert last - 5 <= timesteps.max() <= last


def test_noisy_and_targets_fit_together() -> None:
    schedule = make_schedule()
    noisy, noise, timesteps = Objective(PLAIN, LOSS).training_inputs(LATENTS, SEEDS, schedule)
    a = schedule.alphas_cumprod_T[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close((noisy - (1 - a).sqrt() * noise) / a.sqrt(), LATENTS, atol=1e-3, rtol=1e-3)
    v = Objective(PLAIN, LOSS).training_inputs(LATENTS, SEEDS, make_schedule("v_prediction")).target_BCHW
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, LATENTS, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((1 - a).sqrt() * noisy + a.sqrt() * v, noise, atol=1e-4, rtol=1e-4)


def test_random_strength_is_uniform_and_each_samples_own() -> None:
    """The direction of the draw stays; only its length is multiplied by a number of 0 to 1."""
    latents, seeds = torch.zeros(400, 4, 2, 2), range(400)
    base = sample_noise(latents, seeds, PLAIN)
    whole = sample_noise(latents, seeds, Settings(noise_offset=0.5)) - base
    drawn = sample_noise(latents, seeds, Settings(noise_offset=0.5, noise_offset_random_strength=True)) - base
    strengths = drawn.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    torch.testing.assert_close(drawn, whole * strengths.view(-1, 1, 1, 1), atol=1e-6, rtol=1e-3)
    gamma = Settings(ip_noise_gamma=0.5)
    random_gamma = replace(gamma, ip_noise_gamma_random_strength=True)
    inputs = [input_perturbation(latents, seeds, one).flatten(1).norm(dim=1) for one in (gamma, random_gamma)]
    for found in (strengths, inputs[1] / inputs[0]):
        assert 0 <= found.min() < 0.02
        assert 0.98 < found.max() <= 1
        assert found.mean().item() == pytest.approx(0.5, abs=0.05)
    assert abs(float(torch.corrcoef(torch.stack([strengths, inputs[1] / inputs[0]]))[0, 1])) < 0.2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_input_perturbation_reaches_the_input_only(prediction: str) -> None:
    schedule = make_schedule(prediction)
    plain = Objective(PLAIN, LOSS).training_inputs(LATENTS, SEEDS, schedule)
    perturbed = Objective(Settings(ip_noise_gamma=0.3), LOSS).training_inputs(LATENTS, SEEDS, schedule)
    assert torch.equal(plain.target_BCHW, perturbed.target_BCHW)
    a = schedule.alphas_cumprod_T[plain.timesteps_B].view(-1, 1, 1, 1)
    extra = (perturbed.noisy_BCHW - plain.noisy_BCHW) / (1 - a).sqrt()
    assert extra.std().item() == pytest.approx(0.3, rel=0.1)


def test_at_zero_terminal_the_input_is_the_noise() -> None:
    schedule = make_schedule("v_prediction", zero_terminal_snr=True)
    settings = replace(PLAIN, min_timestep=999)
    noisy, target, timesteps = Objective(settings, LOSS).training_inputs(LATENTS, SEEDS, schedule)
    assert timesteps.tolist() == [999] * 3
    assert torch.equal(noisy, sample_noise(LATENTS, SEEDS, settings))
    assert torch.equal(target, -LATENTS)


def test_objective_takes_the_programs_own_options() -> None:
    objective = Objective(NoiseOptions(noise_offset=0.1), LossOptions(min_snr_gamma=5))
    schedule = make_schedule()
    noisy, target, timesteps = objective.training_inputs(LATENTS, SEEDS, schedule)
    losses = objective.weighted_losses(noisy, target, timesteps, torch.ones(3), schedule)
    assert losses.shape == (3,)
    assert bool(losses.isfinite().all())
