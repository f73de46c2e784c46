"""The sampling loop, and what a step of it asks of the U-Net.

Shapes: B pictures of a batch; the U-Net sees them up to three times: negative prompts first, then the prompts, then
empty prompts. C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from library.families.base import ControlResiduals, Geometry, ModelFamily, TextCondition
from library.generation.jobs import Job
from library.generation.samplers import Sampler

Predict = Callable[[Tensor, Tensor, int], Tensor]
"""(latents (B, C, H, W), timestep, number of the model call) -> prediction of the noise or velocity, guided."""
AfterStep = Callable[[Tensor, int], Tensor]
"""(latents after a step, number of the model call) -> latents to go on with."""


class Steps(Protocol):
    """A sampler, or something that acts as one."""

    @property
    def timesteps(self) -> Tensor: ...

    def model_input(self, latents_BCHW: Tensor, timestep: Tensor) -> Tensor: ...

    def step(
        self, pred_BCHW: Tensor, timestep: Tensor, latents_BCHW: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor: ...


class Residuals(Protocol):
    """What ControlNets add to the U-Net at a model call; None if none of them acts."""

    def __call__(
        self, input_BCHW: Tensor, timesteps_B: Tensor, condition: TextCondition, geometry: Geometry, call: int
    ) -> ControlResiduals | None: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (J. Ho and T. Salimans, arXiv:2207.12598, equation 6), also with a separate strength of
    the negative prompt. ``scale`` at most 1: none.
    """

    scale: float
    negative_scale: float | None = None

    @property
    def copies(self) -> int:
        """How often each picture goes through the U-Net."""
        return 1 if self.scale <= 1 else 2 if self.negative_scale is None else 3

    def combine(self, pred_KBCHW: Tensor) -> Tensor:
        """The guided prediction (B, C, H, W) of the copies one below another (K·B, C, H, W)."""
        if self.copies == 1:
            return pred_KBCHW
        if self.negative_scale is None:
            negative_BCHW, positive_BCHW = pred_KBCHW.chunk(2)
            return negative_BCHW + self.scale * (positive_BCHW - negative_BCHW)
        negative_BCHW, positive_BCHW, empty_BCHW = pred_KBCHW.chunk(3)
        toward_BCHW = self.scale * (positive_BCHW - empty_BCHW)
        return empty_BCHW + toward_BCHW - self.negative_scale * (negative_BCHW - empty_BCHW)


@dataclass
class GuidedUNet:
    """The U-Net as a `Predict`: copies for guidance, its number type, what ControlNets add."""

    family: ModelFamily
    unet: nn.Module
    steps: Steps
    condition: TextCondition
    geometry: Geometry
    guidance: Guidance
    dtype: torch.dtype
    residuals: Residuals | None = None

    def __call__(self, latents_BCHW: Tensor, timestep: Tensor, call: int) -> Tensor:
        copies = self.guidance.copies
        input_BCHW = self.steps.model_input(latents_BCHW, timestep).to(self.dtype)
        input_KBCHW = input_BCHW.repeat(copies, 1, 1, 1) if copies > 1 else input_BCHW
        timesteps_KB = timestep.expand(len(input_KBCHW))
        inputs = (input_KBCHW, timesteps_KB, self.condition, self.geometry)
        added = None if self.residuals is None else self.residuals(*inputs, call)
        pred_KBCHW = self.family.predict(self.unet, *inputs, added)
        return self.guidance.combine(pred_KBCHW.float())


@dataclass
class Setup:
    """A batch that is about to be drawn. An `Extension` may change anything in it before the loop begins.

    ``steps`` is ``sampler`` and ``predict`` is ``unet`` unless something is wrapped around it. ``latents_BCHW`` carry
    the latent scale and the sampler's starting noise, ``noise_BCHW`` is that noise itself. ``first_call``: the model
    calls before it are left out. ``stage``: 1 in the second stage of highres fix. ``clean_BCHW``: latents of a given
    picture to begin from, if there are any.
    """

    batch: Sequence[Job]
    steps: Steps
    unet: GuidedUNet
    predict: Predict
    generators: Sequence[torch.Generator]
    latents_BCHW: Tensor
    sampler: Sampler
    noise_BCHW: Tensor
    stage: int = 0
    clean_BCHW: Tensor | None = None
    first_call: int = 0
    after_step: list[AfterStep] = field(default_factory=list["AfterStep"])


Extension = Callable[[Setup], AbstractContextManager[object]]
"""Something that takes part in drawing: entered before the loop, left after it; nothing stays changed."""


@dataclass
class Denoising:
    """One batch on its way from noise to latents.

    ``first_call``: the model calls before it are left out (image to image). ``generators``: one for each picture, for
    samplers that draw noise. ``after_step`` are applied in order; ``on_progress`` hears of every finished call.
    """

    steps: Steps
    predict: Predict
    generators: Sequence[torch.Generator]
    first_call: int = 0
    after_step: Iterable[AfterStep] = field(default_factory=tuple)
    on_progress: Callable[[], None] = lambda: None

    @torch.no_grad()
    def run(self, latents_BCHW: Tensor) -> Tensor:
        """Latents (B, C, H, W) in float32, carrying the latent scale."""
        for call, timestep in enumerate(self.steps.timesteps[self.first_call :], self.first_call):
            pred_BCHW = self.predict(latents_BCHW, timestep, call)
            latents_BCHW = self.steps.step(pred_BCHW, timestep, latents_BCHW, self.generators)
            for change in self.after_step:
                latents_BCHW = change(latents_BCHW, call)
            self.on_progress()
        return latents_BCHW


def starting_noise(shape_CHW: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Noise (B, C, H, W) in float32, each picture's from its own generator on the CPU: the same on all devices."""
    return torch.stack([torch.randn(*shape_CHW, generator=generator) for generator in generators]).to(device)


def start_from(sampler: Sampler, clean_BCHW: Tensor, noise_BCHW: Tensor, strength: float) -> tuple[Tensor, int]:
    """Noisy latents to begin with for a given picture, and the first model call, at which the sampler then begins.

    The noise has the level of the first step that is taken; strength 1 takes all steps, strength 0 none.
    """
    first = sampler.first_call(strength)
    if first >= len(sampler.timesteps):
        return clean_BCHW, first
    sampler.begin_at(first)
    return sampler.add_noise(clean_BCHW, noise_BCHW, first), first
