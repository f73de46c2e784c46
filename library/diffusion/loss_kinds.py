"""How far a prediction is from its target, number by number: squared, absolute, or pseudo-Huber errors. Always float32.

With d = prediction - target and a threshold c, one for each sample:
l2 d^2 · l1 |d| · huber 2 c (sqrt(d^2 + c^2) - c) · smooth_l1 2 (sqrt(d^2 + c^2) - c).

The pseudo-Huber forms are smooth and treat small errors as squares, large ones as absolute values, so single wild
pixels pull less. ``huber`` becomes d^2 for a large c; ``smooth_l1`` becomes 2 |d| for a small c and d^2 / c for a large
one. Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"
(arXiv:2403.16728), which also schedules c over the timesteps. Factors and names are those of the reference.

Shapes: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.diffusion.schedule import NoiseSchedule, at_timesteps

if TYPE_CHECKING:
    from library.options import LossOptions

LOWEST_THRESHOLD = 1e-6  # squares of smaller ones vanish in float32, and with them the gradient where d is 0


def errors(
    pred_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor, schedule: NoiseSchedule, settings: LossOptions
) -> Tensor:
    """The error of every number, shaped like the prediction."""
    difference_BCHW = pred_BCHW.float() - target_BCHW.float()
    if settings.loss_type == "l2":
        return difference_BCHW**2
    if settings.loss_type == "l1":
        return difference_BCHW.abs()
    c_B111 = huber_thresholds(timesteps_B, schedule, settings).view(-1, *[1] * (difference_BCHW.ndim - 1))
    return 2 * _pseudo_huber(difference_BCHW, c_B111) * (c_B111 if settings.loss_type == "huber" else 1.0)


def _pseudo_huber(difference: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, in a form that keeps small d beside a large c: d^2 / (sqrt(d^2 + c^2) + c)."""
    square = difference**2
    return square / ((square + c**2).sqrt() + c)


def huber_thresholds(timesteps_B: Tensor, schedule: NoiseSchedule, settings: LossOptions) -> Tensor:
    """The threshold c of each sample, by its own timestep t (T = 1000 of them), times ``huber_scale``.

    constant: ``huber_c``. exponential: huber_c^(t / T), from 1 where there is no noise down to huber_c. snr:
    (1 - huber_c) / (1 + sigma)^2 + huber_c with sigma = sqrt((1 - ac) / ac), which falls with the signal.
    """
    floor = settings.huber_c
    if settings.huber_schedule == "exponential":
        c_B = torch.exp(math.log(floor) * timesteps_B.float() / len(schedule))
    elif settings.huber_schedule == "snr":
        ac_B = at_timesteps(schedule.alphas_cumprod_T, timesteps_B, timesteps_B)
        signal_B, noise_B = ac_B.sqrt(), (1 - ac_B).sqrt()
        share_B = signal_B / (signal_B + noise_B)  # 1 / (1 + sigma), finite also where no signal is left
        c_B = (1 - floor) * share_B**2 + floor
    else:
        c_B = torch.full(timesteps_B.shape, floor, device=timesteps_B.device)
    return (c_B * settings.huber_scale).clamp(min=LOWEST_THRESHOLD)
