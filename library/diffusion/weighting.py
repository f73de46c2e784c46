"""Loss weightings by signal-to-noise ratio. A new one is one function and one row of `WEIGHTINGS`.

Every factor is finite at SNR 0 (the last step of a zero-terminal-SNR schedule). SNR is that of the schedule in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.diffusion.schedule import LAST_PLAIN_SNR, NoiseSchedule
from library.models.spec import PredictionType

if TYPE_CHECKING:
    from library.options import LossOptions

MAX_SNR = 1000.0


Weighting = Callable[..., Tensor]
"""(snr_B, the values of its options, what is predicted) -> factor_B."""


def min_snr(snr_B: Tensor, gamma: float, prediction: PredictionType) -> Tensor:
    """min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for velocity. Hang et al. 2023, section 3.4."""
    if prediction == "v_prediction":
        return snr_B.clamp(max=gamma) / (snr_B + 1)
    return torch.where(snr_B < gamma, 1.0, gamma / snr_B)


def scale_v_like_noise(snr_B: Tensor, value: float, prediction: PredictionType) -> Tensor:
    """SNR / (SNR + 1): gives a velocity loss the size of the noise loss."""
    capped_B = snr_B.clamp(max=MAX_SNR)
    return capped_B / (capped_B + 1)


def v_like(snr_B: Tensor, strength: float, prediction: PredictionType) -> Tensor:
    """1 + strength (SNR + 1) / SNR: adds a velocity-like share to a noise loss."""
    capped_B = snr_B.clamp(LAST_PLAIN_SNR, MAX_SNR)
    return 1 + strength * (capped_B + 1) / capped_B


def debiased(snr_B: Tensor, value: float, prediction: PredictionType) -> Tensor:
    """1 / sqrt(SNR) for noise. Yu et al. 2023, "Debias the Training of Diffusion Models", equation 10.

    For velocity, whose squared error is (SNR + 1) / SNR times that of the noise, the same objective has the weight
    sqrt(SNR) / (SNR + 1).
    """
    capped_B = snr_B.clamp(max=MAX_SNR)
    if prediction == "v_prediction":
        return capped_B.sqrt() / (capped_B + 1)
    return 1 / capped_B.clamp(min=LAST_PLAIN_SNR).sqrt()


WEIGHTINGS: tuple[tuple[Weighting, tuple[str, ...]], ...] = (
    (min_snr, ("min_snr_gamma",)),
    (scale_v_like_noise, ("scale_v_pred_loss_like_noise_pred",)),
    (v_like, ("v_pred_like_loss",)),
    (debiased, ("debiased_estimation_loss",)),
)
"""Weighting and the options that it takes; active where the first is set (not None, False or 0). Factors multiply."""


def loss_factors(timesteps_B: Tensor, schedule: NoiseSchedule, settings: LossOptions) -> Tensor | None:
    """The product of all active weightings per sample, or None if none is active."""
    rows = [(function, [getattr(settings, name) for name in names]) for function, names in WEIGHTINGS]
    active = [(function, values) for function, values in rows if values[0]]
    if not active:
        return None
    snr_B = schedule.snr_T[timesteps_B]
    factors_B = torch.ones_like(snr_B)
    for function, values in active:
        factors_B = factors_B * function(snr_B, *values, schedule.prediction_type)
    return factors_B
