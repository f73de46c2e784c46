"""Samplers by the names that users know, on diffusers' schedulers, with the noise schedule of the training.

Nothing is clipped: latents have no fixed range. Under zero terminal SNR the samplers use the changed schedule and begin
at its last step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.diffusion.schedule import NoiseSchedule
from library.log import UserError

MAX_STEPS = 1000
"""Steps that a prompt may ask for: as many as the noise schedule has."""
SMALLEST_ALPHA_CUMPROD = 2.0**-24
"""Stands for 0 at the last step of a zero-terminal-SNR schedule, where sigma would be infinite."""


@dataclass(frozen=True)
class SamplerRow:
    """A scheduler class of diffusers by name (None: our own linear multistep), its settings, and what its steps take.

    With fewer steps than ``min_steps`` a sampler would never see the noisy end of the schedule, or divide by zero.
    ``counts_steps``: it goes by the number of its calls, so it has to be told where it begins. ``has_midpoints``: after
    every other call latents are between two levels of its table.
    """

    class_name: str | None
    settings: dict[str, Any]
    draws_noise: bool = False
    min_steps: int = 1
    counts_steps: bool = True
    has_midpoints: bool = False


_LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
_SOLVER = {"solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "sigma_min"}
_ROWS: dict[str, SamplerRow] = {
    "ddim": SamplerRow("DDIMScheduler", {"clip_sample": False, **_LEADING}, min_steps=2, counts_steps=False),
    "pndm": SamplerRow("PNDMScheduler", {"skip_prk_steps": True, **_LEADING}, min_steps=2, counts_steps=False),
    "lms": SamplerRow(None, {}, min_steps=2),
    "euler": SamplerRow("EulerDiscreteScheduler", {}, min_steps=2),
    "euler_a": SamplerRow("EulerAncestralDiscreteScheduler", {}, draws_noise=True, min_steps=2),
    "heun": SamplerRow("HeunDiscreteScheduler", {}, min_steps=2),
    "dpm_2": SamplerRow("KDPM2DiscreteScheduler", {}, min_steps=2, has_midpoints=True),
    "dpm_2_a": SamplerRow("KDPM2AncestralDiscreteScheduler", {}, draws_noise=True, min_steps=3, has_midpoints=True),
    "dpmsolver": SamplerRow("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **_SOLVER}),
    "dpmsolver++": SamplerRow("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_SOLVER}),
    "dpmsingle": SamplerRow("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", **_SOLVER}),
}
_SAME = {f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}
SAMPLER_NAMES: tuple[str, ...] = (*_ROWS, *_SAME)


@dataclass
class Sampler:
    """A scheduler set to a number of steps. ``timesteps`` may hold more model calls than steps (heun, dpm_2, pndm)."""

    scheduler: Any
    draws_noise: bool
    num_steps: int
    counts_steps: bool = True
    has_midpoints: bool = False

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of all model calls, in order, possibly not whole."""
        return self.scheduler.timesteps

    @property
    def initial_scale(self) -> float:
        """What the starting noise is multiplied by."""
        return float(self.scheduler.init_noise_sigma)

    @property
    def prediction_type(self) -> str:
        """What the model says: epsilon or v_prediction."""
        return self.scheduler.config["prediction_type"]

    def model_input(self, latents_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """Latents as the model expects them at this timestep."""
        return self.scheduler.scale_model_input(latents_BCHW, timestep)

    def step(
        self, pred_BCHW: Tensor, timestep: Tensor, latents_BCHW: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The latents after this model call; each picture's noise comes from its own generator."""
        extra = {"generator": list(generators)} if self.draws_noise else {}
        return self.scheduler.step(pred_BCHW, timestep, latents_BCHW, return_dict=False, **extra)[0]

    def first_call(self, strength: float) -> int:
        """The model call with which to begin when a picture is given: ``strength`` of all steps are taken."""
        left_out = self.num_steps - min(int(self.num_steps * strength), self.num_steps)
        return min(left_out * self.scheduler.order, len(self.timesteps))

    def begin_at(self, call: int) -> None:
        """Begin at this model call instead of the first one.

        PNDM takes its second timestep twice: the repetition moves to the second one that is left.
        """
        if self.counts_steps:
            self.scheduler.set_begin_index(call)
        elif len(self.timesteps) > self.num_steps:
            once = [*self.timesteps[:1], *self.timesteps[2:]]
            self.scheduler.timesteps = torch.stack([*once[: call + 1], *once[call + 1 : call + 2], *once[call + 1 :]])

    def add_noise(self, clean_BCHW: Tensor, noise_BCHW: Tensor, call: int) -> Tensor:
        """Latents with the noise of the level at which a model call begins; clean ones after the last call."""
        if call >= len(self.timesteps):
            return clean_BCHW
        if not self.counts_steps:
            timesteps_B = self.timesteps[call].expand(len(clean_BCHW))
            return self.scheduler.add_noise(clean_BCHW, noise_BCHW, timesteps_B)
        sigma = self.scheduler.sigmas[call].item()
        noisy_BCHW = clean_BCHW + sigma * noise_BCHW
        # solvers keep the variance at 1: their latents are not scaled for the model
        return noisy_BCHW / (1 + sigma**2) ** 0.5 if self.initial_scale == 1 else noisy_BCHW

    def is_at_midpoint(self, call: int) -> bool:
        """True if the latents that come to this model call have no level of the table."""
        return self.has_midpoints and call % 2 == 1 and call < len(self.timesteps)


def check_sampler(name: str, steps: int) -> SamplerRow:
    """What a sampler is. Raises UserError for an unknown name or too few steps."""
    row = _ROWS.get(_SAME.get(name, name))
    if row is None:
        raise UserError(f"sampler {name!r}: there is none of this name; choose one of {', '.join(SAMPLER_NAMES)}")
    if steps < row.min_steps:
        raise UserError(f"sampler {name}: needs at least {row.min_steps} steps, not {steps}; ask for more")
    return row


def make_sampler(name: str, steps: int, schedule: NoiseSchedule, device: torch.device | str = "cpu") -> Sampler:
    """A sampler by name for ``steps`` steps. Raises UserError for an unknown name or too few steps."""
    row = check_sampler(name, steps)
    settings = {
        "num_train_timesteps": len(schedule),
        "trained_betas": _finite_betas(schedule).tolist(),
        "prediction_type": schedule.prediction_type,
        **row.settings,
    }
    if schedule.zero_terminal_snr and "timestep_spacing" in settings:
        settings["timestep_spacing"] = "trailing"
    scheduler = _scheduler_class(row)(**settings)
    scheduler.set_timesteps(steps, device=device)
    return Sampler(scheduler, row.draws_noise, steps, row.counts_steps, row.has_midpoints)


def _scheduler_class(row: SamplerRow) -> Callable[..., Any]:
    if row.class_name is None:
        from library.generation.multistep import LinearMultistepScheduler

        return LinearMultistepScheduler
    import diffusers

    return getattr(diffusers, row.class_name)


def _finite_betas(schedule: NoiseSchedule) -> Tensor:
    """The betas, the last one a little smaller where the schedule ends in pure noise."""
    betas_T = schedule.betas_T.cpu().clone()
    if schedule.zero_terminal_snr:
        betas_T[-1] = 1 - SMALLEST_ALPHA_CUMPROD / schedule.alphas_cumprod_T[-2].item()
    return betas_T
