"""Image to image and inpainting equal diffusers' pipelines on the same modules, latents and noise."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.generation.engine import Engine
from library.generation.from_picture import FromPicture
from library.generation.jobs import Job
from library.models.spec import EOS_ID
from library.text.tokenizer import SD2_TOKENIZER, clip_tokenizer
from tests.generation.engines import engine_of, job, sdxl_parts, write_mask, write_picture
from tests.parity.test_sampling import PLAIN, SCHEDULERS
from tests.text_diffusion_fixtures import diffusers_pipeline, toy_parts

NAMES = ("ddim", "euler", "euler_a", "dpmsolver++", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsingle")


@functools.cache
def engine(family: str = "sd1") -> Engine:
    return engine_of(sdxl_parts() if family == "sdxl" else toy_parts(family))


def scheduler(name: str) -> Any:
    import diffusers

    class_name, settings = SCHEDULERS[name]
    return getattr(diffusers, class_name)(**{**PLAIN, **settings})


def our_latents(one: Job, family: str = "sd1") -> Tensor:
    """What a job begins from, drawn from the VAE's posterior."""
    return FromPicture(engine(family)).latents([one])


def told(one: Job) -> dict[str, Any]:
    return {
        "prompt": one.prompt,
        "negative_prompt": one.negative_prompt,
        "num_inference_steps": one.shared.steps,
        "guidance_scale": one.shared.scale,
        "strength": one.shared.strength,
        "generator": torch.Generator().manual_seed(one.seed),
        "output_type": "np",
    }


def picture(one: Job, family: str = "sd1") -> np.ndarray:
    return (engine(family).draw([one])[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_picture(tmp_path / "source.png")


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_image_to_image(name: str, strength: float, source: str, record_property: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    one = job(files={"source": source}, sampler=name, strength=strength)
    plain = diffusers_pipeline(engine().parts, scheduler(name))
    pipeline: Any = StableDiffusionImg2ImgPipeline(**plain.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(image=our_latents(one), **told(one)).images[0]
    difference = float(np.abs(picture(one) - expected).max())
    record_property("error", difference)
    print(f"img2img {name} strength {strength}: largest difference {difference:.2e}")
    assert expected.std() > 0.02
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmsolver++", "heun"])
def test_inpainting(name: str, source: str, tmp_path: Path, record_property: Any) -> None:
    """Their picture is compared where ours is drawn: we put the given picture's own pixels back elsewhere."""
    from diffusers import StableDiffusionInpaintPipeline

    mask = write_mask(tmp_path / "mask.png", (16, 16, 48, 56))
    one = job(files={"source": source, "mask": mask}, sampler=name, strength=0.8)
    plain = diffusers_pipeline(engine().parts, scheduler(name))
    pipeline: Any = StableDiffusionInpaintPipeline(**plain.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = our_latents(one)
    expected = pipeline(
        image=latents,
        masked_image_latents=latents,
        mask_image=Image.open(mask),
        height=64,
        width=64,
        **told(one),
    ).images[0]
    inside = (slice(21, 51), slice(21, 43))  # beyond the ramp
    difference = float(np.abs(picture(one)[inside] - expected[inside]).max())
    record_property("error", difference)
    print(f"inpainting {name}: largest difference {difference:.2e}")
    assert np.abs(picture(job(sampler=name))[inside] - expected[inside]).max() > 0.02
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["euler", "dpmsolver++"])
def test_image_to_image_of_sdxl(name: str, source: str) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    parts = engine("sdxl").parts
    pipeline: Any = StableDiffusionXLImg2ImgPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoders[0],
        text_encoder_2=parts.text_encoders[1],
        tokenizer=clip_tokenizer(EOS_ID),
        tokenizer_2=clip_tokenizer(0, None, SD2_TOKENIZER),
        unet=parts.unet,
        scheduler=scheduler(name),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    one = job(files={"source": source}, sampler=name, strength=0.6)
    expected = pipeline(
        image=our_latents(one, "sdxl"), original_size=(64, 64), target_size=(64, 64), **told(one)
    ).images[0]
    difference = float(np.abs(picture(one, "sdxl") - expected).max())
    print(f"SDXL img2img {name}: largest difference {difference:.2e}")
    assert expected.std() > 0.02
    assert difference < 1e-4
    assert np.abs(picture(job(sampler=name), "sdxl") - expected).max() > 0.02


def test_latents_of_a_picture_are_a_sample_of_the_vaes_posterior(source: str) -> None:
    from diffusers.image_processor import VaeImageProcessor

    from library.rng import torch_stream

    one, other = (job(seed, files={"source": source}) for seed in (3, 4))
    vae: Any = engine().parts.vae
    posterior = vae.encode(VaeImageProcessor().preprocess(Image.open(source))).latent_dist
    expected = posterior.sample(torch_stream(3, "picture")) * 0.18215
    assert torch.allclose(our_latents(one), expected, atol=1e-5)
    assert not torch.allclose(our_latents(other), expected, atol=1e-3)  # each job draws with its own seed
