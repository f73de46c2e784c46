"""Draws batches of jobs with one model. Text is encoded once per distinct prompt and network strength.

Shapes: B pictures, K copies for guidance (negative prompts, prompts, empty prompts, each B rows), C latent channels,
H W latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from library.diffusion.schedule import NoiseSchedule
from library.families.base import Geometry, ModelFamily, ModelParts, TextCondition
from library.generation.denoise import Denoising, Extension, Guidance, GuidedUNet, Setup, starting_noise
from library.generation.jobs import Job, Shared, texts_of
from library.generation.samplers import make_sampler
from library.generation.vae import decode, encode
from library.text.encode import ConditionCache
from library.text.tokens import CHUNK_TOKENS, TextSettings

logger = logging.getLogger(__name__)

USUAL_ROWS = 3
"""Rows of 75 tokens that a prompt may have, unless an option says something else."""


@dataclass(frozen=True)
class EngineSettings:
    """What holds for all pictures of a run. ``dtype`` is the U-Net's, ``precision`` opens the autocast region of text
    encoders and U-Net; the VAE takes ``vae_batch`` pictures at a time (below 1: a share of the batch).
    """

    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype = torch.float32
    clip_skip: int | None = None
    max_rows: int = USUAL_ROWS
    normalize: Literal["original", "none", "abs"] = "original"
    vae_batch: float | None = None
    precision: Callable[[], AbstractContextManager[object]] = nullcontext


AfterDecode = Callable[[Sequence[Job], Tensor], Tensor]
"""(jobs, pictures (B, 3, pixels, pixels) in -1..1) -> pictures to go on with."""


@dataclass
class Engine:
    """A loaded model with everything attached to it.

    ``before_batch`` are called with the jobs before their text is encoded; ``extensions`` take part in the drawing, in
    this order. ``set_multipliers`` gives the networks their strengths: before a text is encoded and before drawing.
    ``after_decode`` change the pictures that come out of the VAE.
    """

    family: ModelFamily
    parts: ModelParts
    settings: EngineSettings
    on_progress: Callable[[], None] = lambda: None
    set_multipliers: Callable[[Sequence[float]], None] = lambda multipliers: None
    before_batch: list[Callable[[Sequence[Job]], None]] = field(default_factory=list[Callable[[Sequence[Job]], None]])
    extensions: list[Extension] = field(default_factory=list[Extension])
    after_decode: list[AfterDecode] = field(default_factory=list[AfterDecode])
    _cut: set[str] = field(default_factory=set[str], repr=False)
    _texts: dict[tuple[int, tuple[float, ...]], ConditionCache] = field(default_factory=dict, repr=False)

    # ---- text

    def with_rows(self, shared: Shared, prompt: str, negative_prompt: str) -> Shared:
        """The same for these texts: with as many rows as the longest of them needs that is drawn after.

        A text that needs more than there may be is told, once.
        """
        texts = [*texts_of(prompt, shared), *([negative_prompt] if guidance_of(shared).copies > 1 else ())]
        needed = {text: self._rows_of(text) for text in texts}
        limit = self.settings.max_rows
        for text in (text for text, rows in needed.items() if rows > limit and text not in self._cut):
            self._cut.add(text)
            logger.warning(
                "%.60s...: is longer than %d tokens, the rest is not read; shorten it, or let gen_img.py read more "
                "with --max_embeddings_multiples",
                text,
                limit * CHUNK_TOKENS,
            )
        return replace(shared, rows=min(limit, max(needed.values())))

    def _rows_of(self, text: str) -> int:
        """Rows of 75 tokens that a text needs if nothing is cut off."""
        settings = replace(self._text_settings(len(text) + 1), shrink=True)  # far more than it can need
        return self.family.tokenize([text], settings).rows[0].ids_BNT.shape[1]

    def forget_texts(self) -> None:
        """Encode every text anew from now on: the text encoders have changed."""
        self._texts.clear()

    def encode(self, *wanted: tuple[Sequence[str], Shared]) -> list[TextCondition]:
        """The conditions of several texts each, a row a text; every text is encoded once for each strength of the
        networks. Encoders that live elsewhere come once for all of them.
        """
        caches = [(self._texts_of(shared), texts) for texts, shared in wanted]
        known = all(text in cache for cache, texts in caches for text in texts)
        with nullcontext() if known else _on_device(self.parts.text_encoders, self.settings.device):
            return [_joined([_row(cache, text) for text in texts]) for cache, texts in caches]

    def _texts_of(self, shared: Shared) -> ConditionCache:
        key = (shared.rows, shared.multipliers)
        if key not in self._texts:
            self._texts[key] = ConditionCache(lambda captions: self._encode(captions, shared))
        return self._texts[key]

    def _text_settings(self, rows: int) -> TextSettings:
        return TextSettings(
            max_token_length=CHUNK_TOKENS * rows,
            clip_skip=self.settings.clip_skip,
            weighted_captions=True,
            breaks=True,
            normalize=self.settings.normalize,
        )

    def _encode(self, captions: Sequence[str], shared: Shared) -> tuple[Tensor | None, ...]:
        self.set_multipliers(shared.multipliers)
        settings = self._text_settings(shared.rows)
        tokens = self.family.tokenize(list(captions), settings)
        with self.settings.precision():
            condition = self.family.encode(self.parts.text_encoders, tokens, settings)
        condition = condition.to(self.settings.device, self.settings.dtype)
        return condition.hidden_BTD, condition.pooled_BP, condition.by_layer_BSTD

    def condition(self, batch: Sequence[Job]) -> TextCondition:
        """The condition of all copies: negative prompts, prompts (the last sub-prompts), empty prompts."""
        shared = batch[0].shared
        prompts = ([job.texts[-1] for job in batch], shared.for_text(shared.parts - 1))
        negative = ([job.negative_prompt for job in batch], shared.for_text(None))
        empty = ([""] * len(batch), shared.for_text(None))
        copies = {1: (prompts,), 2: (negative, prompts), 3: (negative, prompts, empty)}
        return _joined(self.encode(*copies[guidance_of(shared).copies]))

    # ---- pictures

    @torch.no_grad()
    def draw(self, batch: Sequence[Job]) -> Tensor:
        """Pictures (B, 3, height, width) in -1..1, not clipped, float32, on the CPU."""
        return self.finish(batch, self.draw_latents(batch))

    @torch.no_grad()
    def draw_latents(self, batch: Sequence[Job], stage: int = 0, clean_BCHW: Tensor | None = None) -> Tensor:
        """Latents (B, C, H, W) of a batch, float32, carrying the latent scale.

        ``clean_BCHW``: such latents to begin from, in place of what the jobs begin from. ``stage``: 1 in the second
        stage of highres fix.
        """
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
        latents_BCHW = noise_BCHW * sampler.initial_scale
        setup = Setup(
            batch,
            sampler,
            unet,
            unet,
            generators,
            latents_BCHW,
            sampler,
            noise_BCHW,
            stage=stage,
            clean_BCHW=clean_BCHW,
        )
        with ExitStack() as stack:
            stack.enter_context(self.settings.precision())
            for extension in self.extensions:
                stack.enter_context(extension(setup))
            unet.steps = setup.steps
            self.set_multipliers(shared.multipliers)
            run = Denoising(
                setup.steps, setup.predict, generators, setup.first_call, setup.after_step, self.on_progress
            )
            return run.run(setup.latents_BCHW)

    def latent_shape(self, shared: Shared) -> tuple[int, int, int]:
        """C, H, W of a picture's latents."""
        factor = self.family.latent_factor
        return (self.family.latent_channels, shared.height // factor, shared.width // factor)

    @torch.no_grad()
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

    def encode_pictures(self, pictures_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents (B, C, H, W) of pictures in -1..1, carrying the latent scale, drawn from the VAE's posterior: each
        with its own generator.
        """
        mean_BCHW, std_BCHW = self.posterior(pictures_BCHW)
        return self.sample_posterior(mean_BCHW, std_BCHW, generators)

    def posterior(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of pictures, without the latent scale, float32, on the CPU."""
        size = vae_batch_size(self.settings.vae_batch, len(pictures_BCHW))
        found = [encode(self.family, self.parts, part, self.settings.device) for part in pictures_BCHW.split(size)]
        mean_BCHW, std_BCHW = (torch.cat(parts) for parts in zip(*found, strict=True))
        return mean_BCHW, std_BCHW

    def sample_posterior(self, mean_BCHW: Tensor, std_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents that carry the latent scale, on the device."""
        noise_BCHW = starting_noise(mean_BCHW.shape[1:], generators, torch.device("cpu"))
        return ((mean_BCHW + std_BCHW * noise_BCHW) * self.family.latent_scale).to(self.settings.device)


def _row(cache: ConditionCache, text: str) -> TextCondition:
    """One text alone: one may be told to each layer, its neighbour to all alike."""
    hidden_BTD, pooled_BP, by_layer_BSTD = cache([text])
    assert hidden_BTD is not None
    return TextCondition(hidden_BTD, pooled_BP, by_layer_BSTD)


def _joined(conditions: Sequence[TextCondition]) -> TextCondition:
    """Conditions one below another; for each layer as soon as one of them is."""
    hidden_BTD = torch.cat([condition.hidden_BTD for condition in conditions])
    pooled = [condition.pooled_BP for condition in conditions if condition.pooled_BP is not None]
    layers = {one.by_layer_BSTD.shape[1] for one in conditions if one.by_layer_BSTD is not None}
    by_layer = [
        one.hidden_BTD[:, None].expand(-1, *layers, -1, -1) if one.by_layer_BSTD is None else one.by_layer_BSTD
        for one in conditions
        if layers
    ]
    return TextCondition(hidden_BTD, torch.cat(pooled) if pooled else None, torch.cat(by_layer) if by_layer else None)


@contextmanager
def _on_device(modules: Sequence[nn.Module], device: torch.device) -> Generator[None]:
    """Modules on the device meanwhile, for those that live elsewhere to leave it free."""
    homes = [(module, next(module.parameters()).device) for module in modules]
    try:
        for module, _ in homes:
            module.to(device)
        yield
    finally:
        for module, home in homes:
            module.to(home)


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
