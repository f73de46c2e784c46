"""Gradual Latent: euler_a steps that begin with small latents and let them grow while the noise goes.

Shapes: B pictures, C latent channels, H W latent height and width. Ancestral Euler steps: K. Crowson's k-diffusion.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.generation.jobs import GradualLatent
from library.generation.samplers import Sampler

ROUNDED_TO = 8  # latent cells: sizes on the way are multiples of it
SAMPLERS = ("euler_a", "k_euler_a")
logger = logging.getLogger(__name__)


def attach_gradual_latent(engine: Engine) -> None:
    """Let the jobs' Gradual Latent work in this engine. To be called after pictures are attached."""
    engine.extensions.append(Growing().grow)


@dataclass
class Growing:
    """The extension. It remembers for which samplers it has said that it does nothing."""

    _told: set[str] = field(default_factory=set[str])

    @contextmanager
    def grow(self, setup: Setup) -> Generator[None]:
        """Begin small and step with growing."""
        shared = setup.batch[0].shared
        if shared.gradual_latent is not None:
            if shared.sampler in SAMPLERS:
                begin_small(setup, shared.gradual_latent)
            elif shared.sampler not in self._told:
                self._told.add(shared.sampler)
                logger.warning("Gradual Latent has no effect on the sampler %s: it is for euler_a", shared.sampler)
        yield


def begin_small(setup: Setup, plan: GradualLatent) -> None:
    """Make the latents of a batch small, and its steps such that they grow."""
    steps = GradualSteps(setup.sampler, plan, (setup.latents_BCHW.shape[2], setup.latents_BCHW.shape[3]))
    steps.call = setup.first_call
    steps.sizes = sizes_of(plan, setup.sampler.timesteps.tolist(), setup.first_call, steps.full_size)
    if setup.first_call < len(setup.sampler.timesteps):
        setup.latents_BCHW = steps.sharpened(resized(setup.latents_BCHW, size_at(plan.ratio, steps.full_size)))
    setup.steps = steps


def growth(plan: GradualLatent, timesteps: Sequence[float], first: int = 0) -> dict[int, float]:
    """The step number and the share of the full size of each step that enlarges.

    A last quarter of the steps, or as many as lie between two growths if those are fewer, always has the full size.
    """
    ratio, waited, found = plan.ratio, plan.every_n_steps, dict[int, float]()
    at_the_end = min(plan.every_n_steps, max(1, (len(timesteps) - first) // 4))
    for step, timestep in list(enumerate(timesteps))[first:]:
        is_late = len(timesteps) - step <= at_the_end
        if ratio < 1 and (is_late or (timestep < plan.timesteps and waited >= plan.every_n_steps)):
            ratio = 1.0 if is_late else min(ratio + plan.ratio_step, 1.0)
            found[step] = ratio
            waited = 0
        waited += 1
    return found


def size_at(ratio: float, full_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latents at a share of the full size: multiples of 8 on the way."""
    if ratio >= 1:
        return full_size
    height, width = (min(side, max(ROUNDED_TO, int(side * ratio) // ROUNDED_TO * ROUNDED_TO)) for side in full_size)
    return height, width


def sizes_of(
    plan: GradualLatent, timesteps: Sequence[float], first: int, full_size: tuple[int, int]
) -> dict[int, tuple[int, int]]:
    """The size after each step that enlarges."""
    return {step: size_at(ratio, full_size) for step, ratio in growth(plan, timesteps, first).items()}


def resized(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic; the same tensor if it has the size."""
    if tuple(x_BCHW.shape[-2:]) == size:
        return x_BCHW
    return F.interpolate(x_BCHW, size, mode="bicubic", align_corners=False)


def unsharp(x_BCHW: Tensor, kernel_size: int, sigma: float, strength: float) -> Tensor:
    """Unsharp masking: x + strength (x - gauss(x)). A kernel of size 0 leaves x as it is."""
    if kernel_size == 0:
        return x_BCHW
    places = torch.arange(kernel_size, dtype=torch.float32, device=x_BCHW.device) - kernel_size // 2
    weights = torch.exp(-0.5 * (places / sigma) ** 2) if sigma > 0 else (places == 0).float()
    weights = weights / weights.sum()
    channels, reach = x_BCHW.shape[1], kernel_size // 2
    blurred = F.pad(x_BCHW, (reach, reach, reach, reach), mode="replicate")
    blurred = F.conv2d(blurred, weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    blurred = F.conv2d(blurred, weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return x_BCHW + strength * (x_BCHW - blurred)


@dataclass
class GradualSteps:
    """Ancestral Euler steps, some of which enlarge. ``call``: the model call that comes next."""

    sampler: Sampler
    plan: GradualLatent
    full_size: tuple[int, int]
    call: int = 0
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])

    @property
    def timesteps(self) -> Tensor:
        """Those of the sampler."""
        return self.sampler.timesteps

    def _sigma(self, call: int) -> float:
        return self.sampler.scheduler.sigmas[call].item()

    def model_input(self, latents_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """Latents scaled to variance 1."""
        return latents_BCHW / (self._sigma(self.call) ** 2 + 1) ** 0.5

    def sharpened(self, x_BCHW: Tensor) -> Tensor:
        """Latents after unsharp masking, if it is asked for."""
        if self.plan.unsharp is None:
            return x_BCHW
        kernel_size, sigma, strength, _ = self.plan.unsharp
        return unsharp(x_BCHW, int(kernel_size), sigma, strength)

    def step(
        self, pred_BCHW: Tensor, timestep: Tensor, latents_BCHW: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The latents after this model call, larger if it is its turn; each picture's noise is its own generator's."""
        sigma, to = self._sigma(self.call), self._sigma(self.call + 1)
        clean_BCHW = latents_BCHW - sigma * pred_BCHW
        if self.sampler.prediction_type == "v_prediction":
            clean_BCHW = latents_BCHW / (sigma**2 + 1) - pred_BCHW * sigma / (sigma**2 + 1) ** 0.5
        derivative_BCHW = (latents_BCHW - clean_BCHW) / sigma
        up = (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
        down = (to**2 - up**2) ** 0.5
        size = self.sizes.get(self.call)
        self.call += 1
        if size is None:
            moved_BCHW, strength = latents_BCHW + derivative_BCHW * (down - sigma), up
        else:
            moved_BCHW = self._enlarged(latents_BCHW, derivative_BCHW * (down - sigma), size)
            strength = up * self.plan.s_noise
        shape = (1, *moved_BCHW.shape[1:])
        noise_BCHW = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return moved_BCHW + strength * noise_BCHW.to(moved_BCHW)

    def _enlarged(self, latents_BCHW: Tensor, change_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        targets_x = self.plan.unsharp is None or bool(self.plan.unsharp[3])
        if targets_x:
            return self.sharpened(resized(latents_BCHW + change_BCHW, size))
        return self.sharpened(resized(latents_BCHW, size)) + resized(change_BCHW, size)
