"""The VAE at work: latents to pictures and back, wherever it lives and whatever its number type.

Shapes: B pictures, C latent channels, H W latent height and width (in ``images_BCHW`` and ``pictures_BCHW``: pixels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from library.families.base import ModelFamily, ModelParts


def decode(family: ModelFamily, parts: ModelParts, latents_BCHW: Tensor, device: torch.device) -> Tensor:
    """RGB images in -1..1 (not clipped), float32, on the CPU.

    Half precision can overflow in the VAE and leave a black picture: such an image is decoded again in float32.
    """
    vae = parts.vae
    images_BCHW = _with_vae(vae, device, lambda: family.decode_latents(vae, latents_BCHW), _is_broken)
    return images_BCHW.float().cpu()


@torch.no_grad()
def encode(family: ModelFamily, parts: ModelParts, images_BCHW: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, C, H, W) of the latents of RGB images in -1..1, without the latent scale, float32, on the
    CPU. What overflows in half precision is encoded again in float32.
    """
    vae = parts.vae

    def work() -> Tensor:
        posterior = family.encode_images(vae, images_BCHW)
        return torch.stack([posterior.mean, posterior.std])

    found_2BCHW = _with_vae(vae, device, work, lambda found: not bool(found.isfinite().all()))
    mean_BCHW, std_BCHW = found_2BCHW.float().cpu()
    return mean_BCHW, std_BCHW


def _with_vae(
    vae: Any, device: torch.device, work: Callable[[], Tensor], is_broken: Callable[[Tensor], bool]
) -> Tensor:
    """What ``work`` gives with the VAE on a device; once more in float32 if it is broken in half precision."""
    home, dtype = vae.device, vae.dtype
    try:
        nn.Module.to(vae, device)  # the library's own `to` warns at every call
        with torch.autocast(device.type, enabled=False):
            result = work()
            if dtype != torch.float32 and is_broken(result):
                nn.Module.to(vae, torch.float32)
                result = work()
    finally:
        nn.Module.to(vae, home, dtype)
    return result


def _is_broken(images_BCHW: Tensor) -> bool:
    """Not finite, or one flat colour."""
    return not bool(images_BCHW.isfinite().all()) or bool(images_BCHW.max() == images_BCHW.min())
