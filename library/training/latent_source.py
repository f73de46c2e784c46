"""Latents of a batch for the training step: taken as cached, or made from pixels, always scaled, finite and float32."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import Batch
from library.families.base import ModelFamily
from library.log import UserError
from library.rng import torch_stream

logger = logging.getLogger(__name__)


class LatentSource:
    """Batch -> latents (B, C, H, W) as the U-Net sees them.

    Images go through the VAE in its own dtype; each sample's draw of the posterior comes from its own seed. Images
    whose latents are not finite go through it again in float32; UserError names those that fail even then.
    """

    def __init__(self, family: ModelFamily, vae: Any, device: torch.device) -> None:
        self._family = family
        self._vae = vae
        self._device = device
        self.float32_retries: set[str] = set()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        if batch.latents_BCHW is not None:
            return batch.latents_BCHW.to(self._device, torch.float32) * self._family.latent_scale
        assert batch.images_BCHW is not None
        latents_BCHW = self._encode(batch.images_BCHW, batch.seeds)
        if not bool(latents_BCHW.isfinite().all()):
            latents_BCHW = self._again_in_float32(batch)
        return latents_BCHW * self._family.latent_scale

    def _encode(self, images_BCHW: Tensor, seeds: tuple[int, ...]) -> Tensor:
        posterior = self._family.encode_images(self._vae, images_BCHW)
        mean_BCHW, std_BCHW = posterior.mean.float(), posterior.std.float()
        shape = tuple(mean_BCHW.shape[1:])
        noise = [torch.randn(shape, generator=torch_stream(seed, "posterior")) for seed in seeds]
        return mean_BCHW + std_BCHW * torch.stack(noise).to(mean_BCHW.device)

    def _again_in_float32(self, batch: Batch) -> Tensor:
        assert batch.images_BCHW is not None
        former = self._vae.dtype
        nn.Module.to(self._vae, torch.float32)  # the library's own `to` warns at every call
        try:
            latents_BCHW = self._encode(batch.images_BCHW, batch.seeds)
        finally:
            nn.Module.to(self._vae, former)
        bad = [key for key, one in zip(batch.keys, latents_BCHW, strict=True) if not bool(one.isfinite().all())]
        if bad:
            raise UserError(
                f"the VAE gives no finite latents for {', '.join(bad)}, not even in float32; check the VAE file"
            )
        if not self.float32_retries.issuperset(batch.keys):
            logger.warning("latents made again in float32: %s (--no_half_vae avoids this)", ", ".join(batch.keys))
            self.float32_retries.update(batch.keys)
        return latents_BCHW
