"""Guidance by looking at the picture: CLIP compares it with a text or a picture, VGG16 with a picture.

At each step the final picture is estimated and decoded; the gradient of the loss moves the prediction (K. Crowson's
guided diffusion; P. Dhariwal and A. Nichol, arXiv:2105.05233, algorithm 2). Each picture has its own loss.

Shapes: B pictures, C latent channels, H W latent height and width.
Symbols: x latents, eps noise, ac the product of alphas, sigma the noise level where x has not been scaled down.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.families.base import Geometry
from library.generation.critics import ClipCritic, VggCritic, sphere_distance
from library.generation.denoise import Guidance, GuidedUNet, Setup
from library.generation.engine import Engine
from library.generation.guides import guide_pictures
from library.generation.jobs import Job
from library.log import UserError
from library.options.generation import ControlOptions

VARIANCE_KEEPING, SIGMA_SPACE = ("ddim", "pndm"), ("lms", "k_lms")
LEAST_SIGNAL = 1e-3  # below this share of signal in the latents nothing can be seen in them
PictureLoss = Callable[[Tensor], Tensor]
"""Pictures (B, 3, pixels, pixels) in 0..1 -> loss of each (B)."""


def attach_guidance(engine: Engine, options: ControlOptions) -> None:
    """Load the networks that the options ask for and let them guide. Raises UserError."""
    scales = (options.clip_guidance_scale, options.clip_image_guidance_scale, options.vgg16_guidance_scale)
    if any(scales):
        guidance = PictureGuidance(engine, options)
        engine.extensions.append(guidance)
        engine.after_decode.append(guidance.remember)


class PictureGuidance:
    """The extension. Where a job has no guide picture, the last one drawn is the guide; for the first there is none."""

    def __init__(self, engine: Engine, options: ControlOptions) -> None:
        self.engine, self.options = engine, options
        device = engine.settings.device
        wants_clip = options.clip_guidance_scale or options.clip_image_guidance_scale
        self._clip = ClipCritic(options.clip_guidance_model, device) if wants_clip else None
        self._vgg: VggCritic | None = None
        if options.vgg16_guidance_scale:
            self._vgg = VggCritic(options.vgg16_weights, options.vgg16_guidance_layer).to(device)
        self._last_3HW: Tensor | None = None

    def remember(self, batch: Sequence[Job], pictures_BCHW: Tensor) -> Tensor:
        """Keep the last picture, in case the next has no guide."""
        self._last_3HW = (pictures_BCHW[-1] / 2 + 0.5).clamp(0, 1)
        return pictures_BCHW

    @contextmanager
    def __call__(self, setup: Setup) -> Generator[None]:
        sampler = setup.batch[0].shared.sampler
        if sampler not in (*VARIANCE_KEEPING, *SIGMA_SPACE):
            possible = ", ".join((*VARIANCE_KEEPING, *SIGMA_SPACE))
            raise UserError(f"CLIP and VGG guidance work with the samplers {possible} only, not with {sampler}")
        if setup.batch[0].shared.regional:
            raise UserError(
                "CLIP and VGG guidance cannot be used for sub-prompts in regions; leave out AND or the mask"
            )
        losses = self._losses(setup.batch)
        if losses:
            steering = _Steering(self.engine, setup, losses)
            if sampler in SIGMA_SPACE:
                setup.predict = steering.watched(setup.predict)
                setup.after_step.insert(0, steering.moved)
            else:
                setup.predict = steering.steered(setup.predict)
        yield

    def _losses(self, batch: Sequence[Job]) -> list[PictureLoss]:
        """The losses of a batch, each times its strength."""
        options, losses = self.options, list[PictureLoss]()
        if self._clip is not None and options.clip_guidance_scale:
            texts_BD = self._clip.texts([job.clip_prompt or job.prompt for job in batch])
            losses.append(self._clip_loss(texts_BD, options.clip_guidance_scale))
        guides_B3HW = self._guides(batch)
        if guides_B3HW is None:
            return losses
        with torch.no_grad():
            if self._clip is not None and options.clip_image_guidance_scale:
                target_BD = self._clip.pictures(guides_B3HW, mode="nearest")
                losses.append(self._clip_loss(target_BD, options.clip_image_guidance_scale))
            if self._vgg is not None:
                losses.append(self._vgg_loss(self._vgg(guides_B3HW), options.vgg16_guidance_scale))
        return losses

    def _clip_loss(self, target_BD: Tensor, scale: float) -> PictureLoss:
        clip = self._clip
        assert clip is not None
        return lambda pictures_B3HW: scale * sphere_distance(clip.pictures(pictures_B3HW), target_BD)

    def _vgg_loss(self, target_BChw: Tensor, scale: float) -> PictureLoss:
        vgg = self._vgg
        assert vgg is not None
        return lambda pictures_B3HW: scale * (vgg(pictures_B3HW) - target_BChw).square().mean(dim=(1, 2, 3))

    def _guides(self, batch: Sequence[Job]) -> Tensor | None:
        """The pictures to be like (B, 3, pixels, pixels) in 0..1; None if there are none yet."""
        device, shared = self.engine.settings.device, batch[0].shared
        if batch[0].guides:
            return guide_pictures(batch, 0).to(device)
        if self._last_3HW is None:
            return None
        last_13HW = F.interpolate(self._last_3HW[None], (shared.height, shared.width), mode="bilinear", antialias=True)
        return last_13HW.expand(len(batch), -1, -1, -1).to(device)


class _Steering:
    """One batch. Its own U-Net call sees the prompts alone, without guidance by the negative ones."""

    def __init__(self, engine: Engine, setup: Setup, losses: Sequence[PictureLoss]) -> None:
        self.engine, self.setup, self.losses = engine, setup, losses
        count, unet = len(setup.batch), setup.unet
        first = count if unet.guidance.copies > 1 else 0
        rows = slice(first, first + count)
        self._unet: GuidedUNet = replace(
            unet,
            condition=unet.condition.rows(rows),
            geometry=Geometry(
                unet.geometry.original_sizes_hw_B2[rows],
                unet.geometry.crop_top_lefts_B2[rows],
                unet.geometry.target_sizes_hw_B2[rows],
            ),
            guidance=Guidance(1.0),
        )
        self._push_BCHW: Tensor | None = None

    # ---- samplers whose latents keep their variance

    def steered(self, inner: Any) -> Any:
        """eps <- eps - sqrt(1 - ac) g, with g the negative gradient of the loss for x."""
        schedule = self.engine.settings.schedule

        def predict(latents_BCHW: Tensor, timestep: Tensor, call: int) -> Tensor:
            pred_BCHW = inner(latents_BCHW, timestep, call)
            ac = float(schedule.alphas_cumprod_T[int(timestep)])
            if ac < LEAST_SIGNAL:
                return pred_BCHW
            predicts_velocity = schedule.prediction_type == "v_prediction"

            def estimate(x_BCHW: Tensor, own_BCHW: Tensor) -> Tensor:
                if predicts_velocity:
                    clean_BCHW = ac**0.5 * x_BCHW - (1 - ac) ** 0.5 * own_BCHW
                else:
                    clean_BCHW = (x_BCHW - (1 - ac) ** 0.5 * own_BCHW) / ac**0.5
                share = (1 - ac) ** 0.5
                return share * clean_BCHW + (1 - share) * x_BCHW

            change_BCHW = (1 - ac) ** 0.5 * self._direction(latents_BCHW, timestep, call, estimate)
            # velocity is (eps - sqrt(1 - ac) x) / sqrt(ac)
            return pred_BCHW - (change_BCHW / ac**0.5 if predicts_velocity else change_BCHW)

        return predict

    # ---- samplers whose latents carry noise of sigma

    def watched(self, inner: Any) -> Any:
        """x <- x + sigma^2 g for the next step: the prediction stays, see `moved`."""
        predicts_velocity = self.engine.settings.schedule.prediction_type == "v_prediction"
        scheduler = self.setup.sampler.scheduler

        def predict(latents_BCHW: Tensor, timestep: Tensor, call: int) -> Tensor:
            pred_BCHW = inner(latents_BCHW, timestep, call)
            sigma = float(scheduler.sigmas[call])
            if 1 / (sigma**2 + 1) < LEAST_SIGNAL:
                self._push_BCHW = None
                return pred_BCHW

            def estimate(x_BCHW: Tensor, own_BCHW: Tensor) -> Tensor:
                if predicts_velocity:
                    return x_BCHW / (sigma**2 + 1) - own_BCHW * sigma / (sigma**2 + 1) ** 0.5
                return x_BCHW - sigma * own_BCHW

            self._push_BCHW = sigma**2 * self._direction(latents_BCHW, timestep, call, estimate)
            return pred_BCHW

        return predict

    def moved(self, latents_BCHW: Tensor, call: int) -> Tensor:
        """Latents after a step, with what the loss adds: a step is x plus a multiple of eps, so this may come last."""
        return latents_BCHW if self._push_BCHW is None else latents_BCHW + self._push_BCHW

    # ----

    def _direction(
        self, latents_BCHW: Tensor, timestep: Tensor, call: int, estimate: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """g, in which the loss sinks fastest (B, C, H, W); zero where it is no number."""
        self._unet.steps, self._unet.residuals = self.setup.steps, self.setup.unet.residuals
        with torch.enable_grad():
            x_BCHW = latents_BCHW.detach().clone().requires_grad_()
            pictures_B3HW = self._decoded(estimate(x_BCHW, self._unet(x_BCHW, timestep, call)))
            loss = torch.stack([loss(pictures_B3HW).sum() for loss in self.losses]).sum()
            (gradient_BCHW,) = torch.autograd.grad(loss, x_BCHW)
        return -torch.nan_to_num(gradient_BCHW, nan=0.0, posinf=0.0, neginf=0.0)

    def _decoded(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures in 0..1, with gradients."""
        vae, family = self.engine.parts.vae, self.engine.family
        nn.Module.to(vae, self.engine.settings.device)
        return (family.decode_latents(vae, latents_BCHW).float() / 2 + 0.5).clamp(0, 1)
