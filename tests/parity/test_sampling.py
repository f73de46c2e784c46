"""Our pictures equal those of diffusers' pipeline on the same modules and latents, for every sampler that it has."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from library.diffusion.schedule import make_schedule
from library.families.sd import SdFamily
from library.generation.engine import Engine, EngineSettings
from library.generation.prompts import PromptSpec
from library.generation.sample import draw_sample, sample_job
from tests.text_diffusion_fixtures import diffusers_pipeline
from tests.text_diffusion_fixtures import toy_parts as fresh_parts

toy_parts = functools.cache(fresh_parts)
CPU = torch.device("cpu")
PLAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVER = {"solver_type": "midpoint", "final_sigmas_type": "sigma_min"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"steps_offset": 1, "skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **SOLVER}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **SOLVER}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", **SOLVER}),
}
PROMPT = PromptSpec("a photo of a cat", "blurry", 64, 64, seed=3, sample_steps=4, scale=5.0)


def engine_of(parts: Any, zero: bool = False, clip_skip: int | None = None) -> Engine:
    settings = EngineSettings(make_schedule(parts.prediction_type, zero), CPU, clip_skip=clip_skip)
    return Engine(SdFamily(v2=parts.spec.family == "sd2"), parts, settings)


def ours(parts: Any, prompt: PromptSpec, zero: bool = False, clip_skip: int | None = None) -> np.ndarray:
    engine = engine_of(parts, zero, clip_skip)
    images_BCHW = engine.draw([sample_job(engine, prompt, "ddim")])
    return (images_BCHW[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def theirs(
    parts: Any, prompt: PromptSpec, extra: dict[str, Any] | None = None, clip_skip: int | None = None
) -> np.ndarray:
    import diffusers

    name, settings = SCHEDULERS[prompt.sample_sampler or "ddim"]
    scheduler = getattr(diffusers, name)(
        **{**PLAIN, "prediction_type": parts.prediction_type, **settings, **(extra or {})}
    )
    pipeline = diffusers_pipeline(parts, scheduler)
    return pipeline(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        width=prompt.width,
        height=prompt.height,
        num_inference_steps=prompt.sample_steps,
        guidance_scale=prompt.scale,
        generator=torch.Generator().manual_seed(prompt.seed or 0),
        clip_skip=clip_skip,
        output_type="np",
    ).images[0]


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("family", "prediction"), [("sd1", "epsilon"), ("sd2", "v_prediction")])
def test_every_sampler_draws_diffusers_picture(name: str, family: str, prediction: str, record_property: Any) -> None:
    parts, prompt = toy_parts(family, prediction), replace(PROMPT, sample_sampler=name)
    picture, expected = ours(parts, prompt), theirs(parts, prompt)
    difference = error(picture, expected)
    record_property("error", difference)
    print(f"{name} {family}: largest difference {difference:.2e}")
    assert expected.std() > 0.02  # not a flat picture, where all would be equal
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmsolver++"])
def test_zero_terminal_schedule_draws_diffusers_picture(name: str) -> None:
    parts, prompt = toy_parts("sd2", "v_prediction"), replace(PROMPT, sample_sampler=name)
    extra: dict[str, Any] = {"rescale_betas_zero_snr": True}
    if name == "ddim":
        extra["timestep_spacing"] = "trailing"
    picture = ours(parts, prompt, zero=True)
    # diffusers' DDIM divides by a true 0 there, ours by the small number that its other schedulers take
    assert error(picture, theirs(parts, prompt, extra)) < (2e-3 if name == "ddim" else 1e-4)
    assert error(picture, ours(parts, prompt)) > 0.02  # it is not the plain schedule's


def test_clip_skip_and_size_reach_the_picture() -> None:
    # without guidance: diffusers skips no layers of the negative prompt
    parts, prompt = toy_parts(), replace(PROMPT, width=96, height=64, scale=1.0)
    picture = ours(parts, prompt, clip_skip=2)
    assert picture.shape == (64, 96, 3)
    assert error(picture, theirs(parts, prompt, clip_skip=1)) < 1e-4
    assert error(picture, ours(parts, prompt)) > 1e-3


def test_picture_is_eight_bit_rgb() -> None:
    parts = toy_parts()
    picture = draw_sample(engine_of(parts), PROMPT, "ddim")
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert error(np.asarray(picture, dtype=np.float32) / 255, ours(parts, PROMPT)) < 0.51 / 255


def test_without_guidance() -> None:
    parts, prompt = toy_parts(), replace(PROMPT, scale=1.0, negative_prompt="")
    assert error(ours(parts, prompt), theirs(parts, prompt)) < 1e-4


def test_picture_depends_on_its_seed_alone() -> None:
    parts, prompt = toy_parts(), replace(PROMPT, sample_sampler="euler_a")
    first = ours(parts, prompt)
    torch.manual_seed(99)
    ours(parts, replace(prompt, seed=8))
    assert np.array_equal(ours(parts, prompt), first)
    assert not np.array_equal(ours(parts, replace(prompt, seed=8)), first)
    fresh = replace(prompt, seed=None)
    assert not np.array_equal(ours(parts, fresh), ours(parts, fresh))


def test_weights_breaks_and_long_prompts_change_the_picture() -> None:
    parts = toy_parts()
    plain = ours(parts, PROMPT)
    for text in ("a photo of a (cat:1.8)", "a photo BREAK of a cat", "a photo of a cat, " * 40):
        assert error(ours(parts, replace(PROMPT, prompt=text)), plain) > 3e-3


def test_usual_size_is_the_models_and_sizes_are_rounded() -> None:
    parts = toy_parts()
    assert ours(parts, replace(PROMPT, width=None, height=None)).shape == (64, 64, 3)
    assert ours(parts, replace(PROMPT, width=79, height=8, sample_steps=2)).shape == (64, 72, 3)


class OverflowingVae(torch.nn.Module):
    """A VAE that gives NaN in half precision."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.inner = vae

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def decode(self, latents: torch.Tensor) -> Any:
        output = self.inner.decode(latents)
        if self.dtype != torch.float32:
            output.sample = output.sample * float("nan")
        return output


def test_a_black_picture_is_decoded_again_in_float32() -> None:
    parts = toy_parts()
    expected = ours(parts, PROMPT)
    half = replace(parts, vae=OverflowingVae(fresh_parts().vae.to(torch.bfloat16)))
    picture = ours(half, PROMPT)
    assert error(picture, expected) < 0.1
    assert picture.std() > 0.02
    assert half.vae.dtype == torch.bfloat16
