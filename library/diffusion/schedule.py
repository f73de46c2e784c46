"""The noise schedule that Stable Diffusion 1.x, 2.x and SDXL were trained with, and its zero-terminal-SNR variant.

Symbols: beta_t variance added at step t, ac_t = product of (1 - beta) up to t, SNR_t = ac_t / (1 - ac_t). All float32,
as the models were trained (float64 tables differ by 1e-4 at t = 0). T = 1000 timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.models.spec import PredictionType

TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
LAST_PLAIN_SNR = 0.00468191
"""SNR at the last timestep of the unchanged schedule: the lowest that weights divide by."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Tables over t = 0..999, computed after the zero-terminal change, and what the U-Net predicts."""

    betas_T: Tensor
    alphas_cumprod_T: Tensor
    snr_T: Tensor
    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same tables on a device; call once, not per step."""
        return replace(
            self,
            betas_T=self.betas_T.to(device),
            alphas_cumprod_T=self.alphas_cumprod_T.to(device),
            snr_T=self.snr_T.to(device),
        )

    def __len__(self) -> int:
        return len(self.alphas_cumprod_T)


def make_schedule(prediction_type: PredictionType = "epsilon", zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The schedule "scaled linear": betas are squares of equidistant values between sqrt(0.00085) and sqrt(0.012)."""
    betas_T = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float32) ** 2
    if zero_terminal_snr:
        betas_T = zero_terminal_betas(betas_T)
    alphas_cumprod_T = torch.cumprod(1.0 - betas_T, dim=0)
    snr_T = alphas_cumprod_T / (1.0 - alphas_cumprod_T)
    return NoiseSchedule(betas_T, alphas_cumprod_T, snr_T, prediction_type, zero_terminal_snr)


def zero_terminal_betas(betas_T: Tensor) -> Tensor:
    """Shift and scale sqrt(ac) so that the last step is pure noise and the first is unchanged.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root_T = torch.cumprod(1.0 - betas_T, dim=0).sqrt()
    first, last = root_T[0], root_T[-1]
    alphas_cumprod_T = ((root_T - last) * first / (first - last)) ** 2
    alphas_T = torch.cat([alphas_cumprod_T[:1], alphas_cumprod_T[1:] / alphas_cumprod_T[:-1]])
    return 1.0 - alphas_T


def at_timesteps(table_T: Tensor, timesteps_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """Table values at timesteps, shaped (B, 1, 1, 1) to multiply with ``like_BCHW``."""
    return table_T[timesteps_B].view(-1, *[1] * (like_BCHW.ndim - 1))
