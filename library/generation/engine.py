"""Draws batches of jobs with one model. Text is encoded once per distinct prompt and network strength.

Shapes: B pictures, K copies for guidance (negative prompts, prompts, empty prompts, each B rows), C latent channels,
H W latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from library.diffusion.schedule import NoiseSchedule
from library.families.base import Geometry, ModelFamily, ModelParts, TextCondition
from library.generation.denoise import Denoising, Extension, Guidance, GuidedUNet, Setup, starting_noise
from library.generation.jobs import Job, Shared
from library.generation.pipeline import decode
from library.generation.samplers import make_sampler
from library.text.encode import ConditionCache
from library.text.tokens import CHUNK_TOKENS, TextSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """What holds for all pictures of a run. ``dtype`` is the U-Net's; the VAE takes ``vae_batch`` pictures at a time
    (below 1: a share of the batch).
    """

    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype = torch.float32
    clip_skip: int | None = None
    max_rows: int = 3
    normalize: Literal["original", "none", "abs"] = "original"
    vae_batch: float | None = None


AfterDecode = Callable[[Sequence[Job], Tensor], Tensor]
"""(jobs, pictures (B, 3, pixels, pixels) in -1..1) -> pictures to go on with."""


@dataclass
class Engine:
    """A loaded model with everything attached to it.

    ``before_batch`` are called with the jobs before their text is encoded (strengths of networks); ``extensions`` take
    part in the drawing, in this order; ``after_decode`` change the pictures that come out of the VAE.
    """

    family: ModelFamily
    parts: ModelParts
    settings: EngineSettings
    on_progress: Callable[[], None] = lambda: None
    before_batch: list[Callable[[Sequence[Job]], None]] = field(default_factory=list[Callable[[Sequence[Job]], None]])
    extensions: list[Extension] = field(default_factory=list[Extension])
    after_decode: list[AfterDecode] = field(default_factory=list[AfterDecode])
    _texts: dict[tuple[int, tuple[float, ...]], ConditionCache] = field(default_factory=dict, repr=False)

    # ---- text

    def rows_of(self, *texts: str) -> int:
        """How many rows of 75 tokens the longest of the texts needs, at most ``max_rows``."""
        settings = replace(self._text_settings(self.settings.max_rows), shrink=True)
        return self.family.tokenize(list(texts), settings).rows[0].ids_BNT.shape[1]

    def encode(self, texts: Sequence[str], shared: Shared) -> TextCondition:
        """The condition of texts, one row each; every text is encoded once for each strength of the networks."""
        key = (shared.rows, shared.multipliers)
        if key not in self._texts:
            self._texts[key] = ConditionCache(lambda captions: self._encode(captions, shared.rows))
        hidden_BTD, pooled_BP = self._texts[key](texts)
        assert hidden_BTD is not None
        return TextCondition(hidden_BTD, pooled_BP)

    def _text_settings(self, rows: int) -> TextSettings:
        return TextSettings(
            max_token_length=CHUNK_TOKENS * rows,
            clip_skip=self.settings.clip_skip,
            weighted_captions=True,
            breaks=True,
            normalize=self.settings.normalize,
        )

    def _encode(self, captions: Sequence[str], rows: int) -> tuple[Tensor | None, ...]:
        settings = self._text_settings(rows)
        tokens = self.family.tokenize(list(captions), settings)
        condition = self.family.encode(self.parts.text_encoders, tokens, settings)
        condition = condition.to(self.settings.device, self.settings.dtype)
        return condition.hidden_BTD, condition.pooled_BP

    def condition(self, batch: Sequence[Job]) -> TextCondition:
        """The condition of all copies: negative prompts, prompts, empty prompts."""
        guidance = guidance_of(batch[0].shared)
        texts = [job.prompt for job in batch]
        if guidance.copies > 1:
            texts = [job.negative_prompt for job in batch] + texts
        if guidance.copies > 2:
            texts += [""] * len(batch)
        return self.encode(texts, batch[0].shared)

    # ---- pictures

    @torch.no_grad()
    def draw(self, batch: Sequence[Job]) -> Tensor:
        """Pictures (B, 3, height, width) in -1..1, not clipped, float32, on the CPU."""
        return self.finish(batch, self.draw_latents(batch))

    def draw_latents(self, batch: Sequence[Job]) -> Tensor:
        """Latents (B, C, H, W) of a batch, float32, carrying the latent scale."""
        shared = batch[0].shared
        device = self.settings.device
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in batch]
        sampler = make_sampler(shared.sampler, shared.steps, self.settings.schedule, device)
        noise_BCHW = starting_noise(self.latent_shape(shared), generators, device)
        guidance = guidance_of(shared)
        for prepare in self.before_batch:
            prepare(batch)
        unet = GuidedUNet(
            self.family,
            self.parts.unet,
            sampler,
            self.condition(batch),
            geometry_of(shared, len(batch), guidance.copies, device),
            guidance,
            self.settings.dtype,
        )
        setup = Setup(batch, sampler, unet, unet, generators, noise_BCHW * sampler.initial_scale)
        with ExitStack() as stack:
            for extension in self.extensions:
                stack.enter_context(extension(setup))
            unet.steps = setup.steps
            run = Denoising(
                setup.steps, setup.predict, generators, setup.first_call, setup.after_step, self.on_progress
            )
            return run.run(setup.latents_BCHW)

    def latent_shape(self, shared: Shared) -> tuple[int, int, int]:
        """C, H, W of a picture's latents."""
        factor = self.family.latent_factor
        return (self.family.latent_channels, shared.height // factor, shared.width // factor)

    def finish(self, batch: Sequence[Job], latents_BCHW: Tensor) -> Tensor:
        """Pictures of the latents that were drawn for jobs."""
        pictures_BCHW = self.decode(latents_BCHW)
        for change in self.after_decode:
            pictures_BCHW = change(batch, pictures_BCHW)
        return pictures_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures of latents, through the VAE in small batches."""
        size = vae_batch_size(self.settings.vae_batch, len(latents_BCHW))
        pictures = [decode(self.family, self.parts, part, self.settings.device) for part in latents_BCHW.split(size)]
        return torch.cat(pictures)


def guidance_of(shared: Shared) -> Guidance:
    """How the pictures of a batch are guided."""
    return Guidance(shared.scale, shared.negative_scale)


def vae_batch_size(asked: float | None, count: int) -> int:
    """Pictures that the VAE takes at a time: the whole batch, a number, or (below 1) a share, at least one."""
    if asked is None:
        return count
    return max(1, int(asked if asked >= 1 else asked * count))


def geometry_of(shared: Shared, count: int, copies: int, device: torch.device) -> Geometry:
    """The size condition of all copies; only the negative prompts have original sizes of their own."""
    sizes = shared.sizes
    target = (shared.height, shared.width)
    original = (_or(sizes.original_height, target[0]), _or(sizes.original_width, target[1]))
    negative = (_or(sizes.original_height_negative, original[0]), _or(sizes.original_width_negative, original[1]))
    crop = (_or(sizes.crop_top, 0), _or(sizes.crop_left, 0))
    originals = [original] * count if copies == 1 else [negative] * count + [original] * count * (copies - 1)
    rows = len(originals)
    return Geometry(
        torch.tensor(originals, device=device),
        torch.tensor([crop] * rows, device=device),
        torch.tensor([target] * rows, device=device),
    )


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value
