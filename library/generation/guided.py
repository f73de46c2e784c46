"""A prompt drawn after a guide picture, by the engine of gen_img.py: for previews of nets in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.families.base import ModelFamily, ModelParts
from library.generation.denoise import Extension
from library.generation.engine import Engine, EngineSettings
from library.generation.jobs import Job, Shared
from library.generation.pipeline import LONGEST_PROMPT_TOKENS, GenerationSettings, picture_size, to_picture
from library.generation.prompts import PromptSpec
from library.rng import fresh_seed
from library.text.tokens import CHUNK_TOKENS

if TYPE_CHECKING:
    from PIL.Image import Image


def generate_guided(
    family: ModelFamily, parts: ModelParts, prompt: PromptSpec, settings: GenerationSettings, net: Extension
) -> Image:
    """The picture that `library.generation.pipeline.generate` draws, with ``net`` taking part. Raises UserError for a
    guide picture that cannot be read.
    """
    engine = Engine(
        family,
        parts,
        EngineSettings(
            settings.schedule,
            settings.device,
            settings.dtype,
            settings.clip_skip,
            max_rows=LONGEST_PROMPT_TOKENS // CHUNK_TOKENS,
        ),
        extensions=[net],
    )
    width, height = picture_size(family, parts, prompt)
    shared = Shared(
        width=width,
        height=height,
        steps=prompt.sample_steps,
        sampler=prompt.sample_sampler or settings.default_sampler,
        scale=prompt.scale,
        rows=engine.rows_of(prompt.prompt, prompt.negative_prompt),
    )
    seed = fresh_seed() if prompt.seed is None else prompt.seed
    guides = () if prompt.controlnet_image is None else (prompt.controlnet_image,)
    job = Job(0, prompt.prompt, prompt.prompt, prompt.negative_prompt, seed, shared, guides=guides)
    with settings.precision():
        latents_BCHW = engine.draw_latents([job])
    return to_picture(engine.finish([job], latents_BCHW))
