"""Drawing from given pictures: image to image, and inpainting, in which only what the mask shows white changes.

Shapes: B pictures, C latent channels, H W latent height and width; of pixels where it says so.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from library.generation.clip_vision import ClipVision
from library.generation.denoise import AfterStep, Setup, start_from
from library.generation.engine import Engine
from library.generation.jobs import Job, Shared
from library.generation.pictures import feathered, fit, read_mask, read_picture, size_of_picture, to_tensor
from library.generation.samplers import Sampler
from library.log import UserError
from library.options.generation import PictureOptions
from library.rng import torch_stream

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT_POSTERIORS = 32
logger = logging.getLogger(__name__)


def attach_pictures(engine: Engine, options: PictureOptions) -> None:
    """Let the engine begin from the jobs' pictures. To be called before other extensions are attached."""
    from_picture = FromPicture(engine, make_clip_vision(engine, options))
    engine.extensions.insert(0, from_picture.begin)
    engine.after_decode.append(from_picture.paste)


def make_clip_vision(engine: Engine, options: PictureOptions) -> ClipVision | None:
    """What sees the pictures for ``--clip_vision_strength``, if asked for and of use."""
    strength = options.clip_vision_strength
    if strength is None:
        return None
    if engine.family.name != "sdxl":
        logger.warning("--clip_vision_strength has no effect: it is for SDXL")
        return None
    return ClipVision(options.clip_vision_model, strength, engine.settings.device)


def is_inpainting(job: Job) -> bool:
    """True if the job's mask says what to draw anew. Raises UserError for a mask that says nothing.

    The mask of a regional job says where its sub-prompts and networks act.
    """
    if job.mask is None or job.shared.regional:
        return False
    if job.source is None:
        raise UserError(
            "--mask_path has no meaning here: give the picture to draw in (--image_path), or networks or sub-prompts "
            "joined by AND, whose regions it can show"
        )
    return True


@dataclass
class FromPicture:
    """Takes part in drawing batches whose jobs have pictures. Encoded pictures are kept for the next batch."""

    engine: Engine
    clip_vision: ClipVision | None = None
    _posteriors: OrderedDict[tuple[str, int, int], tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)

    @contextmanager
    def begin(self, setup: Setup) -> Generator[None]:
        """An extension: begin from the pictures, and keep what the masks do not show."""
        inpaints = is_inpainting(setup.batch[0])
        if setup.batch[0].source is not None:
            self._tell_of_picture(setup)
            if setup.clean_BCHW is None or inpaints:
                own_BCHW = self.latents(setup.batch)
                if setup.clean_BCHW is None:
                    setup.clean_BCHW = own_BCHW
                if inpaints:
                    mask_B1HW = self._cells(setup.batch)
                    setup.clean_BCHW = torch.lerp(own_BCHW, setup.clean_BCHW, mask_B1HW)
                    setup.after_step.append(keep_outside(setup.sampler, mask_B1HW, own_BCHW, setup.noise_BCHW))
        if setup.clean_BCHW is not None:
            strength = setup.batch[0].shared.strength
            setup.latents_BCHW, setup.first_call = start_from(
                setup.sampler, setup.clean_BCHW, setup.noise_BCHW, strength
            )
        yield

    def _tell_of_picture(self, setup: Setup) -> None:
        if self.clip_vision is not None:
            paths = [str(job.source) for job in setup.batch]
            setup.unet.condition = self.clip_vision.in_place_of_text(
                setup.unet.condition, paths, setup.unet.guidance.copies
            )

    def latents(self, batch: Sequence[Job]) -> Tensor:
        """Latents (B, C, H, W) of the jobs' pictures, carrying the latent scale; each drawn with its job's seed."""
        means, stds = zip(*(self._posterior(str(job.source), job.shared) for job in batch), strict=True)
        generators = [torch_stream(job.seed, "picture") for job in batch]
        return self.engine.sample_posterior(torch.stack(means), torch.stack(stds), generators)

    def _posterior(self, path: str, shared: Shared) -> tuple[Tensor, Tensor]:
        key = (path, shared.width, shared.height)
        if key not in self._posteriors:
            mean_BCHW, std_BCHW = self.engine.posterior(to_tensor([_source(path, shared)]))
            self._posteriors[key] = (mean_BCHW[0], std_BCHW[0])
            if len(self._posteriors) > KEPT_POSTERIORS:
                self._posteriors.popitem(last=False)
        return self._posteriors[key]

    def _cells(self, batch: Sequence[Job]) -> Tensor:
        """How much of each latent cell (B, 1, H, W) is drawn anew: the mean of its pixels."""
        masks = torch.stack([_mask(job) for job in batch])
        return F.avg_pool2d(masks, self.engine.family.latent_factor).to(self.engine.settings.device)

    def paste(self, batch: Sequence[Job], pictures_BCHW: Tensor) -> Tensor:
        """After decoding: what the masks do not show are the given pictures' own pixels."""
        if not is_inpainting(batch[0]):
            return pictures_BCHW
        sources = to_tensor([_source(str(job.source), job.shared) for job in batch])
        masks = torch.stack([feathered(_mask(job)) for job in batch])
        return torch.where(masks > 0, torch.lerp(sources, pictures_BCHW, masks), sources)


def _source(path: str, shared: Shared) -> Image:
    return fit(read_picture(path), (shared.width, shared.height))


def _mask(job: Job) -> Tensor:
    return read_mask(str(job.mask), size_of_picture(str(job.source)), (job.shared.width, job.shared.height))


def keep_outside(sampler: Sampler, mask_B1HW: Tensor, own_BCHW: Tensor, noise_BCHW: Tensor) -> AfterStep:
    """After each step: where the mask is 0, the picture's own latents at the level at which the next step begins.

    Latents that are smaller for a while get what they need scaled. Between the two calls of a midpoint step there is
    no such level, so nothing is done there: the next call sets it right.
    """

    def keep(latents_BCHW: Tensor, call: int) -> Tensor:
        if sampler.is_at_midpoint(call + 1):
            return latents_BCHW
        mask, own, noise = mask_B1HW, own_BCHW, noise_BCHW
        size = latents_BCHW.shape[-2:]
        if size != own.shape[-2:]:
            mask = F.interpolate(mask, size, mode="bilinear", align_corners=False)
            own = F.interpolate(own, size, mode="bicubic", align_corners=False)
            noise = F.interpolate(noise, size, mode="nearest-exact")  # keeps the noise's strength
        return torch.lerp(sampler.add_noise(own, noise, call + 1), latents_BCHW, mask)

    return keep
