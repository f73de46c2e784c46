"""From latents to what the U-Net sees and must answer, and from its answer to one loss per sample.

Shapes: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from library.diffusion.loss_kinds import errors
from library.diffusion.noise import input_perturbation, sample_noise, sample_timesteps
from library.diffusion.schedule import NoiseSchedule, at_timesteps
from library.diffusion.weighting import loss_factors

if TYPE_CHECKING:
    from library.options import LossOptions, NoiseOptions


class TrainingInputs(NamedTuple):
    """The U-Net's input, what it must predict (both float32), and the timesteps (int64), on the latents' device."""

    noisy_BCHW: Tensor
    target_BCHW: Tensor
    timesteps_B: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """What a training step asks of noise, target and loss, with their settings bound."""

    noise: NoiseOptions
    loss: LossOptions

    def training_inputs(self, latents_BCHW: Tensor, seeds: Sequence[int], schedule: NoiseSchedule) -> TrainingInputs:
        """Noise latents (already multiplied by the latent scale) at a random timestep each.

        x_t = sqrt(ac) x_0 + sqrt(1 - ac) (e + g z), z the input perturbation. The target is e, or the velocity
        sqrt(ac) e - sqrt(1 - ac) x_0 (Salimans & Ho 2022), never with z. The schedule must be on the latents' device.
        """
        latents = latents_BCHW.float()
        timesteps_B = sample_timesteps(seeds, self.noise).to(latents.device)
        noise_BCHW = sample_noise(latents, seeds, self.noise)
        input_noise_BCHW = noise_BCHW
        if self.noise.ip_noise_gamma:
            input_noise_BCHW = noise_BCHW + input_perturbation(latents, seeds, self.noise)
        noisy_BCHW = add_noise(latents, input_noise_BCHW, timesteps_B, schedule)
        if schedule.prediction_type == "v_prediction":
            return TrainingInputs(noisy_BCHW, velocity(latents, noise_BCHW, timesteps_B, schedule), timesteps_B)
        return TrainingInputs(noisy_BCHW, noise_BCHW, timesteps_B)

    def weighted_losses(
        self,
        pred_BCHW: Tensor,
        target_BCHW: Tensor,
        timesteps_B: Tensor,
        weights_B: Tensor,
        schedule: NoiseSchedule,
        masks_BHW: Tensor | None = None,
    ) -> Tensor:
        """Error by its kind in float32, mean over C, H, W, times the sample's own weight and all weightings: (B,).

        With masks (0..1): the errors are multiplied by them, and the mean is still that over all of H and W, as in the
        reference, so an image of which half counts has half the loss.
        """
        error_BCHW = errors(pred_BCHW, target_BCHW, timesteps_B, schedule, self.loss)
        if masks_BHW is not None:
            error_BCHW = error_BCHW * masks_BHW[:, None]
        losses_B = error_BCHW.mean(dim=tuple(range(1, error_BCHW.ndim))) * weights_B.float()
        factors_B = loss_factors(timesteps_B, schedule, self.loss)
        return losses_B if factors_B is None else losses_B * factors_B


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, schedule: NoiseSchedule) -> Tensor:
    """sqrt(ac) x_0 + sqrt(1 - ac) e."""
    ac_B111 = at_timesteps(schedule.alphas_cumprod_T, timesteps_B, latents_BCHW)
    return ac_B111.sqrt() * latents_BCHW + (1 - ac_B111).sqrt() * noise_BCHW


def velocity(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, schedule: NoiseSchedule) -> Tensor:
    """sqrt(ac) e - sqrt(1 - ac) x_0."""
    ac_B111 = at_timesteps(schedule.alphas_cumprod_T, timesteps_B, latents_BCHW)
    return ac_B111.sqrt() * noise_BCHW - (1 - ac_B111).sqrt() * latents_BCHW
