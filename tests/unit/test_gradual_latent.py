"""Gradual Latent: when latents grow, to which size, and that they always end at the full one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.schedule import make_schedule
from library.generation.gradual_latent import GradualSteps, growth, size_at, sizes_of, unsharp
from library.generation.jobs import GradualLatent
from library.generation.samplers import make_sampler

USUAL = GradualLatent(750, 0.5, 0.125, 3, 1.0, None)


def test_the_trace_of_the_specification() -> None:
    timesteps = make_sampler("euler_a", 28, make_schedule()).timesteps.tolist()
    assert sizes_of(USUAL, timesteps, 0, (128, 128)) == {7: (80, 80), 10: (96, 96), 13: (112, 112), 16: (128, 128)}
    assert [int(timesteps[step]) for step in (7, 10, 13, 16)] == [740, 629, 518, 407]


@given(
    st.integers(0, 1000),
    st.floats(0.05, 1),
    st.floats(0.01, 1),
    st.integers(1, 50),
    st.integers(2, 60),
    st.integers(0, 59),
    st.integers(8, 200),
    st.integers(8, 200),
)
def test_it_always_ends_at_the_full_size(
    start: int, ratio: float, step: float, every: int, steps: int, first: int, height: int, width: int
) -> None:
    plan = GradualLatent(start, ratio, step, every, 1.0, None)
    timesteps = torch.linspace(999, 0, steps).tolist()
    first = min(first, steps - 1)
    found = sizes_of(plan, timesteps, first, (height, width))
    sizes = [size_at(ratio, (height, width)), *found.values()]
    assert sizes[-1] == (height, width)
    assert sizes == sorted(sizes)
    assert all(
        side % 8 == 0 or side == full for size in sizes for side, full in zip(size, (height, width), strict=True)
    )
    assert all(first <= number < steps for number in found)
    late = steps - first >= 8 and every <= 2
    assert not late or max(found, default=0) <= steps - every  # there is something left to draw at the full size


def test_without_growth_the_steps_are_those_of_euler_a() -> None:
    schedule = make_schedule("v_prediction")
    plain, gradual = make_sampler("euler_a", 6, schedule), make_sampler("euler_a", 6, schedule)
    steps = GradualSteps(gradual, USUAL, (16, 16))
    latents = others = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * plain.initial_scale
    generators = [[torch.Generator().manual_seed(n) for n in (5, 6)] for _ in range(2)]
    for timestep in plain.timesteps:
        noisy = plain.model_input(latents, timestep)
        assert torch.allclose(steps.model_input(others, timestep), noisy, atol=1e-6)
        latents = plain.step(noisy.sin(), timestep, latents, generators[0])
        others = steps.step(noisy.sin(), timestep, others, generators[1])
        assert torch.allclose(latents, others, atol=1e-5)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_growing_step(target: float) -> None:
    """x' = resize(x + d (down - sigma)) + s_noise up noise, by hand, without sharpening in effect."""
    sampler = make_sampler("euler_a", 10, make_schedule())
    plan = GradualLatent(750, 0.5, 0.5, 1, 0.25, (3.0, 1.0, 0.0, target))
    steps = GradualSteps(sampler, plan, (16, 16), call=4, sizes={4: (16, 16)})
    x, pred = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    sigma, to = (sampler.scheduler.sigmas[n].item() for n in (4, 5))
    up = (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
    down = (to**2 - up**2) ** 0.5
    moved = torch.nn.functional.interpolate(x + pred * (down - sigma), (16, 16), mode="bicubic")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    found = steps.step(pred, sampler.timesteps[4], x, [torch.Generator().manual_seed(9)])
    assert torch.allclose(found, moved + 0.25 * up * noise, atol=1e-5)
    assert steps.call == 5


def test_unsharp_masking_sharpens_an_edge_and_keeps_flat_parts() -> None:
    x_BCHW = torch.zeros(1, 2, 9, 9)
    x_BCHW[..., 5:] = 1
    sharp_BCHW = unsharp(x_BCHW, 3, 0.5, 0.5)
    assert torch.allclose(sharp_BCHW[..., :3], torch.tensor(0.0), atol=1e-6)
    assert torch.allclose(sharp_BCHW[..., 7:], torch.tensor(1.0), atol=1e-6)
    assert sharp_BCHW[0, 0, 4, 5] > 1
    assert sharp_BCHW[0, 0, 4, 4] < 0
    assert torch.equal(unsharp(x_BCHW, 0, 1.0, 1.0), x_BCHW)
    one = unsharp(x_BCHW, 3, 1.0, 1.0)[0, 0, 4, 4].item()  # weights exp(-1/2), 1, exp(-1/2) over their sum
    assert one == pytest.approx(-(0.6065307 / (1 + 2 * 0.6065307)), abs=1e-5)


def test_growth_begins_below_its_timestep() -> None:
    assert growth(GradualLatent(500, 0.5, 0.5, 3, 1, None), [900, 700, 500, 499, 300, 100, 50, 0]) == {3: 1.0}
