"""Prompts of prompt files as jobs of the engine: previews are drawn as `gen_img.py` draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.generation.engine import Engine
from library.generation.jobs import Job, Shared
from library.generation.pictures import to_picture
from library.generation.prompts import PromptSpec
from library.rng import fresh_seed

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE_STEP = 8
MIN_SIZE = 64


def draw_sample(engine: Engine, prompt: PromptSpec, default_sampler: str) -> Image:
    """The picture of a prompt. Modules keep their mode and device; a VAE or text encoders that are elsewhere come to
    the engine's device only while they work. Raises UserError for what cannot be drawn.
    """
    return to_picture(engine.draw([sample_job(engine, prompt, default_sampler)]))


def sample_job(engine: Engine, prompt: PromptSpec, default_sampler: str) -> Job:
    """The job of a prompt; a prompt without a seed gets a fresh one."""
    width, height = _picture_size(engine, prompt)
    shared = Shared(
        width=width,
        height=height,
        steps=prompt.sample_steps,
        sampler=prompt.sample_sampler or default_sampler,
        scale=prompt.scale,
    )
    return Job(
        number=0,
        raw=prompt.prompt,
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        seed=fresh_seed() if prompt.seed is None else prompt.seed,
        shared=engine.with_rows(shared, prompt.prompt, prompt.negative_prompt),
        guides=() if prompt.controlnet_image is None else (prompt.controlnet_image,),
    )


def _picture_size(engine: Engine, prompt: PromptSpec) -> tuple[int, int]:
    """(width, height) in pixels: multiples of 8, at least 64; the model's usual size where the prompt says nothing."""
    usual = engine.family.default_sample_size(engine.parts)
    width, height = (max(MIN_SIZE, (side or usual) // SIZE_STEP * SIZE_STEP) for side in (prompt.width, prompt.height))
    return width, height
