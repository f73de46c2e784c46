"""The training step: from a batch to one loss. It is the one module that accelerate and DDP wrap.

Shapes: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.data.records import Batch
from library.diffusion.objective import Objective
from library.diffusion.schedule import NoiseSchedule
from library.families.base import Geometry, ModelFamily, ModelParts, TextCondition
from library.training.latent_source import LatentSource
from library.training.trainable import Trainable


class StepResult(NamedTuple):
    """``loss`` is what backward is called on; ``losses_B`` are the samples' own losses after weighting, detached.

    A tuple, because DistributedDataParallel hooks on to the tensors that it finds in lists, tuples and dictionaries:
    with a static graph it would not average the gradients over the processes otherwise, and say nothing.
    """

    loss: Tensor
    losses_B: Tensor


class TrainStep(nn.Module):
    """latents -> text condition -> noise and timestep -> U-Net -> target -> loss per sample -> weights -> one loss.

    Frozen models are reached through unregistered references, so that they are neither broadcast to other processes nor
    saved with the state. Only ``trainable.module`` is a submodule.
    """

    def __init__(
        self,
        *,
        family: ModelFamily,
        parts: ModelParts,
        trainable: Trainable,
        latents: LatentSource,
        text: Callable[[tuple[str, ...]], TextCondition],
        schedule: NoiseSchedule,
        objective: Objective,
        compute_dtype: torch.dtype,
        device: torch.device,
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.trained = trainable.module
        self._trainable = trainable
        self._family = family
        self._unet = [parts.unet]  # in a list: nn.Module would register it
        self.latents = latents
        self._text = text
        self._schedule = schedule
        self._objective = objective
        self._dtype = compute_dtype
        self._device = device
        self._processes = processes

    def forward(self, batch: Batch, step_sample_count: int) -> StepResult:
        """Loss of this process's share of a micro batch.

        ``step_sample_count`` is the number of samples of the whole optimizer step over all micro batches and processes.
        Losses are summed over samples and divided by it, so accumulation and several processes equal one big batch. The
        factor ``processes`` undoes the averaging of gradients between processes.
        """
        losses_B = self.losses(batch, self.latents(batch), self._objective)
        loss = losses_B.sum() * (self._processes / step_sample_count)
        return StepResult(loss=loss, losses_B=losses_B.detach())

    def losses(self, batch: Batch, latents_BCHW: Tensor, objective: Objective) -> Tensor:
        """The loss of each sample after weighting, (B,), of the batch's latents as `latents` gives them."""
        noisy_BCHW, target_BCHW, timesteps_B = objective.training_inputs(latents_BCHW, batch.seeds, self._schedule)
        geometry = Geometry(batch.original_sizes_hw_B2, batch.crop_top_lefts_B2, batch.target_sizes_hw_B2)
        with self._trainable.precision(self._device, self._dtype):
            condition = self._text(batch.captions)
            noisy_BCHW = noisy_BCHW.to(self._dtype)
            residuals = self._trainable.residuals(batch, noisy_BCHW, timesteps_B, condition, geometry)
            noise_pred_BCHW = self._family.predict(
                self._unet[0], noisy_BCHW, timesteps_B, condition, geometry, residuals
            )
        weights_B = batch.loss_weights_B.to(self._device)
        masks_BHW = None if batch.loss_masks_BHW is None else batch.loss_masks_BHW.to(self._device)
        return objective.weighted_losses(
            noise_pred_BCHW.float(), target_BCHW, timesteps_B, weights_B, self._schedule, masks_BHW
        )
