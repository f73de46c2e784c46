"""What a kind of training decides: which parameters learn, in which groups, whether text needs a gradient, what is
written.

The loop, the step and all effects know only this interface. Kinds live in `library.training.kinds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import Batch
from library.families.base import ControlResiduals, Geometry, ModelFamily, ModelParts, TextCondition
from library.generation.denoise import Extension
from library.log import UserError
from library.options.settings import Settings


@dataclass(frozen=True)
class Artifact:
    """What a kind writes: the suffix of its file, and what metadata need to know of it."""

    suffix: str
    modelspec_kind: str


class Trainable(ABC):
    """A kind of training, set up on loaded models."""

    module: nn.Module
    """Everything that learns, as one module: what is wrapped for several processes and stored in the state."""
    artifact: Artifact
    may_train_text: bool
    """False if nothing that learns is reached through the text encoders."""
    may_skip_parameters: bool
    """True if a step may leave some parameters without a gradient."""
    casts_itself: bool
    """True if the forward pass is right without autocast, whatever the dtypes of base and trained weights."""

    @abstractmethod
    def __init__(self, settings: Settings, family: ModelFamily, parts: ModelParts) -> None:
        """Set the training up on loaded models, or on models without weights, for a plan. Raises UserError."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; each may carry ``lr`` and carries its logged name as ``lr_name``."""

    @staticmethod
    def trained_parts(settings: Settings) -> frozenset[str]:
        """Parts of the model itself that learn, or into which it is put, by name (unet, text_encoder ...); they are
        loaded in the type of trained weights.
        """
        return frozenset()

    @abstractmethod
    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], counters: Mapping[str, int]) -> None:
        """Write the artifact under its final name, atomically. ``counters`` (epoch, global_step) are for forms that
        hold them apart from the metadata.
        """

    def family_of_prompts(self, family: ModelFamily) -> ModelFamily:
        """The family as captions and previews are to be read: with words of this training, if it has any."""
        return family

    def saved_numbers(self) -> int:
        """How many numbers an artifact holds."""
        return sum(parameter.numel() for parameter in self.trained_parameters())

    def check(self, path: Path) -> list[str]:
        """Read what was saved again; lines for the report at the end."""
        return []

    def recorded_options(self) -> dict[str, Any]:
        """Options whose true value became known only when the models were built (ranks taken from a file)."""
        return {}

    def precision(self, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
        """The autocast region that the forward pass needs, if any."""
        if dtype == torch.float32 or self.casts_itself:
            return nullcontext()
        return torch.autocast(device.type, dtype=dtype)

    def trained_parameters(self) -> list[nn.Parameter]:
        """All parameters that the optimizer owns, in a fixed order."""
        return [parameter for group in self.parameter_groups() for parameter in group["params"]]

    def on_epoch_start(self) -> None:
        """Switch to train mode."""
        self.module.train()

    def on_step_start(self, step: int) -> None:  # noqa: B027 - most kinds have nothing to do then
        """Before each optimizer step; ``step`` counts those that were done, in earlier sessions too."""

    def why_no_multiplier(self) -> str | None:
        """Why data sets can have no network_multiplier of their own; None if they can."""
        return None

    def require_multipliers(self, multipliers: Iterable[float]) -> None:
        """Raise UserError if data sets ask for a strength that nothing here has."""
        reason = self.why_no_multiplier()
        if reason and any(multiplier != 1.0 for multiplier in multipliers):
            raise UserError(f"network_multiplier: {reason}; leave it out")

    def on_micro_batch(self, network_multiplier: float) -> None:
        """Before each forward pass."""
        self.require_multipliers([network_multiplier])

    def after_update(self) -> dict[str, float]:
        """After each optimizer step; returns scalars to log."""
        return {}

    def residuals(
        self, batch: Batch, noisy_BCHW: Tensor, timesteps_B: Tensor, condition: TextCondition, geometry: Geometry
    ) -> ControlResiduals | None:
        """What a ControlNet in training adds to the U-Net for a batch. Called before the U-Net, within `precision`,
        with gradients recorded; also by nets that add nothing there but need the batch.
        """
        return None

    def preview_extension(self) -> Extension | None:
        """What takes part in drawing previews of prompts that name a picture to draw after, if anything does."""
        return None

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of what learns, if it has any of its own."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors of the state file, in full precision."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
