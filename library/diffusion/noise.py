"""Noise and timesteps of training samples, each a function of the sample's own seed, always float32.

So no batch size, process count or device changes a draw: values are drawn on the CPU per sample, then moved together.
Shapes: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from library.diffusion.schedule import TIMESTEPS
from library.rng import stream, torch_stream

if TYPE_CHECKING:
    from library.options import NoiseOptions


def sample_timesteps(seeds: Sequence[int], settings: NoiseOptions) -> Tensor:
    """One timestep per sample, uniform in [min_timestep, max_timestep), int64 on the CPU."""
    low = settings.min_timestep or 0
    high = TIMESTEPS if settings.max_timestep is None else settings.max_timestep
    return torch.tensor([stream(seed, "timestep").randrange(low, high) for seed in seeds], dtype=torch.int64)


def sample_noise(latents_BCHW: Tensor, seeds: Sequence[int], settings: NoiseOptions) -> Tensor:
    """The noise that the model must find: normal, plus offset, plus pyramid, by the settings."""
    means_BC = None
    if settings.noise_offset and settings.adaptive_noise_scale:
        means_BC = latents_BCHW.detach().float().mean(dim=(2, 3)).abs().cpu()
    samples: list[Tensor] = []
    for index, seed in enumerate(seeds):
        noise_CHW = _normal(tuple(latents_BCHW.shape[1:]), seed, "noise")
        if settings.noise_offset:
            mean_C = None if means_BC is None else means_BC[index]
            noise_CHW = noise_CHW + _offset(noise_CHW, seed, settings, mean_C)
        if settings.multires_noise_iterations:
            iterations, discount = settings.multires_noise_iterations, settings.multires_noise_discount
            noise_CHW = pyramid_noise(noise_CHW, seed, iterations, discount)
        samples.append(noise_CHW)
    return torch.stack(samples).to(latents_BCHW.device)


def input_perturbation(latents_BCHW: Tensor, seeds: Sequence[int], settings: NoiseOptions) -> Tensor:
    """Extra noise on the U-Net's input only, ``ip_noise_gamma`` strong.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv:2301.11706).
    """
    samples: list[Tensor] = []
    for seed in seeds:
        gamma = settings.ip_noise_gamma or 0.0
        if settings.ip_noise_gamma_random_strength:
            gamma *= stream(seed, "ip_noise_strength").random()
        samples.append(gamma * _normal(tuple(latents_BCHW.shape[1:]), seed, "ip_noise"))
    return torch.stack(samples).to(latents_BCHW.device)


def pyramid_noise(noise_CHW: Tensor, seed: int, iterations: int, discount: float) -> Tensor:
    """Add noise of falling resolution, level i with weight ``discount`` ** i, then make the standard deviation 1.

    The side shrinks by r ** i with a new r in [2, 4) at each level, until a side is 1. The deviation is the sample's
    own, so it does not depend on the batch. After Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".
    """
    channels, height, width = noise_CHW.shape
    ratios, generator = stream(seed, "multires_ratio"), torch_stream(seed, "multires_noise")
    total_CHW = noise_CHW
    for level in range(iterations):
        ratio = 2 + 2 * ratios.random()
        h, w = (max(1, int(side / ratio**level)) for side in (height, width))
        coarse_1CHW = torch.randn(1, channels, h, w, generator=generator)
        fine_1CHW = F.interpolate(coarse_1CHW, size=(height, width), mode="bilinear", align_corners=False)
        total_CHW = total_CHW + fine_1CHW[0] * discount**level
        if h == 1 or w == 1:
            break
    return total_CHW / total_CHW.std()


def _offset(noise_CHW: Tensor, seed: int, settings: NoiseOptions, mean_C: Tensor | None) -> Tensor:
    """A constant per channel: max(0, noise_offset + adaptive_noise_scale x |channel mean|) times normal noise.

    With random strength ``noise_offset`` is the upper end of a uniform draw, a new one for each sample.
    """
    constant_C11 = _normal((noise_CHW.shape[0], 1, 1), seed, "noise_offset")
    strength = settings.noise_offset or 0.0
    if settings.noise_offset_random_strength:
        strength *= stream(seed, "noise_offset_strength").random()
    if mean_C is None:
        return strength * constant_C11
    return (strength + (settings.adaptive_noise_scale or 0.0) * mean_C).clamp(min=0).view(-1, 1, 1) * constant_C11


def _normal(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    return torch.randn(shape, generator=torch_stream(seed, name), dtype=torch.float32)
