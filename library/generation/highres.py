"""Highres fix: a small picture is drawn first, enlarged, and drawn again from there at the full size.

Shapes: B pictures, C latent channels, H W latent height and width; of pixels where it says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from library.generation.engine import Engine
from library.generation.jobs import Job, first_stage
from library.generation.pictures import resized, to_picture, to_tensor
from library.log import UserError
from library.options.generation import HighresOptions
from library.options.values import argument_list
from library.rng import seed_of, torch_stream

if TYPE_CHECKING:
    from PIL.Image import Image

SECOND_SEED = 1  # is added to a picture's seed for its second stage
TWO_STAGES = frozenset(name for name in vars(HighresOptions()) if name.startswith("highres_fix_"))
"""The options that a picture of the first stage alone does not depend on."""


class Upscaler(Protocol):
    """What a module of ``--highres_fix_upscaler`` gives by ``create_upscaler(**arguments)``."""

    def to(self, where: Any) -> Any: ...

    def support_latents(self) -> bool: ...

    def upscale(
        self,
        vae: Any,
        images: list[Image] | None,
        latents: Tensor | None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int,
        vae_batch_size: int,
    ) -> Any: ...


@dataclass(frozen=True)
class Drawn:
    """Pictures (B, 3, pixels, pixels) in -1..1 that are to be written. ``batch``: what they were drawn with.

    ``stage``: "" of one stage, "0" and "1" of the two of highres fix.
    """

    batch: Sequence[Job]
    pictures_BCHW: Tensor
    stage: str = ""


def make_stages(engine: Engine, options: HighresOptions) -> Stages:
    """How the engine's batches are drawn. Raises UserError for an upscaler that cannot be used."""
    if options.highres_fix_scale is None:
        return Stages(engine, options)
    vae: Any = engine.parts.vae
    vae.register_to_config(scaling_factor=engine.family.latent_scale)  # what upscalers go by; a VAE file has none
    return Stages(engine, options, load_upscaler(options, engine.settings.device, engine.settings.dtype))


def find_upscaler(options: HighresOptions) -> Callable[[], Upscaler] | None:
    """What makes the upscaler that the options name; its weights are not read yet. Raises UserError."""
    name = options.highres_fix_upscaler
    if name is None:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--highres_fix_upscaler {name}: this module cannot be imported ({error})") from error
    create = getattr(module, "create_upscaler", None)
    if create is None:
        raise UserError(f"--highres_fix_upscaler {name}: the module has no function create_upscaler")
    return partial(create, **argument_list(options.highres_fix_upscaler_args or "", "highres_fix_upscaler_args"))


def load_upscaler(options: HighresOptions, device: torch.device, dtype: torch.dtype) -> Upscaler | None:
    """The upscaler that the options name. Raises UserError."""
    create = find_upscaler(options)
    if create is None:
        return None
    try:
        upscaler = create()
    except TypeError as error:
        raise UserError(f"--highres_fix_upscaler_args {options.highres_fix_upscaler_args}: {error}") from error
    upscaler.to(dtype)
    upscaler.to(device)
    return upscaler


@dataclass
class Stages:
    """Draws batches in one stage or in two. ``upscaler`` None: Lanczos on pixels, or bilinear on latents if asked."""

    engine: Engine
    options: HighresOptions
    upscaler: Upscaler | None = None

    def draw(self, batch: Sequence[Job]) -> Iterator[Drawn]:
        """The pictures of a batch, the first stage's before the final ones if they are to be saved."""
        if self.options.highres_fix_scale is None:
            yield Drawn(batch, self.engine.draw(batch))
            return
        small = [self._small(job, self.options.highres_fix_scale) for job in batch]
        latents_BCHW = self.engine.draw_latents(small)
        on_latents = self._works_on_latents()
        pictures_BCHW: Tensor | None = None
        if self.options.highres_fix_save_1st or not on_latents:
            pictures_BCHW = self.engine.finish(small, latents_BCHW)
            if self.options.highres_fix_save_1st:
                yield Drawn(small, pictures_BCHW, "0")
        large = [replace(job, seed=job.seed + SECOND_SEED) for job in batch]
        clean_BCHW = self._enlarged(large, latents_BCHW, None if on_latents else pictures_BCHW)
        latents_BCHW = self.engine.draw_latents(large, stage=1, clean_BCHW=clean_BCHW)
        yield Drawn(batch, self.engine.finish(large, latents_BCHW), "1")

    def _small(self, job: Job, scale: float) -> Job:
        options = self.options
        return first_stage(
            job, scale, options.highres_fix_steps, options.highres_fix_strength, self.engine.family.picture_step
        )

    def _works_on_latents(self) -> bool:
        if self.upscaler is not None:
            return self.upscaler.support_latents()
        return self.options.highres_fix_latents_upscaling

    @torch.no_grad()
    def _enlarged(self, batch: Sequence[Job], latents_BCHW: Tensor, pictures_BCHW: Tensor | None) -> Tensor:
        """Latents (B, C, H, W) at the full size, carrying the latent scale."""
        shared = batch[0].shared
        if self.upscaler is not None:
            return self._by_module(self.upscaler, batch, latents_BCHW, pictures_BCHW)
        if pictures_BCHW is None:
            size = self.engine.latent_shape(shared)[1:]
            return F.interpolate(latents_BCHW, size, mode="bilinear", align_corners=False)
        return self._encoded(batch, [to_picture(picture[None]) for picture in pictures_BCHW])

    def _by_module(
        self, upscaler: Upscaler, batch: Sequence[Job], latents_BCHW: Tensor, pictures_BCHW: Tensor | None
    ) -> Tensor:
        settings, wanted = self.engine.settings, (1, *self.engine.latent_shape(batch[0].shared))
        parts: list[Tensor] = []
        for index, job in enumerate(batch):  # one by one: a picture is the same alone and in a batch
            with torch.random.fork_rng():  # a module that draws from the global generator can be repeated
                torch.manual_seed(seed_of(job.seed, "upscaler"))
                found = upscaler.upscale(
                    self.engine.parts.vae,
                    None if pictures_BCHW is None else [to_picture(pictures_BCHW[index, None])],
                    latents_BCHW[index, None] if pictures_BCHW is None else None,
                    settings.dtype,
                    job.shared.width,
                    job.shared.height,
                    1,
                    1,
                )
            if not isinstance(found, torch.Tensor):
                found = self._encoded([job], [image.convert("RGB") for image in found])
            if tuple(found.shape) != wanted:
                raise UserError(
                    f"--highres_fix_upscaler {self.options.highres_fix_upscaler}: gave latents of the shape "
                    f"{tuple(found.shape)}, not {wanted}"
                )
            parts.append(found.to(settings.device).float())
        return torch.cat(parts)

    def _encoded(self, batch: Sequence[Job], images: list[Image]) -> Tensor:
        size = (batch[0].shared.width, batch[0].shared.height)
        generators = [torch_stream(job.seed, "picture") for job in batch]
        return self.engine.encode_pictures(to_tensor([resized(image, size) for image in images]), generators)
