"""Training of nets that let a frozen model draw after pictures. Nothing of the model itself learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from library.checkpoint.inspection import check_network_file
from library.checkpoint.io import atomic_path
from library.data.records import Batch
from library.device import attention_kind
from library.families.base import ControlResiduals, Geometry, ModelFamily, ModelParts, TextCondition
from library.generation.control import ControlNets, LLLiteNets, Use
from library.generation.denoise import Extension
from library.log import UserError
from library.models.control import fresh_control, load_control, save_control, take_rgb
from library.models.load import Target
from library.models.memory import keep_less_for_backward, set_attention, set_gradient_checkpointing, store_in_fp8
from library.options import ControlNetOptions, LLLiteOptions, OptimizerOptions, PrecisionOptions
from library.options.settings import Settings
from library.plugin import lllite_networks
from library.training.trainable import Artifact, Trainable

if TYPE_CHECKING:
    from diffusers import ControlNetModel


class ControlTraining(Trainable):
    """What all such nets have in common: everything of the net learns at one rate, text never does."""

    may_train_text = False
    may_skip_parameters = False

    def __init__(self, settings: Settings, parts: ModelParts, modelspec_kind: str) -> None:
        self._rate = settings[OptimizerOptions].learning_rate
        if self._rate == 0:
            raise UserError("nothing to train: --learning_rate is 0")
        precision = settings[PrecisionOptions]
        if precision.fp8_base:
            for part in (*parts.text_encoders, parts.unet):
                store_in_fp8(part)
        self.casts_itself = precision.full_bf16 or precision.full_fp16  # all weights are of the type computed with
        form: str = settings.value_of("save_model_as") or "safetensors"
        self.artifact = Artifact("" if form == "diffusers" else f".{form}", modelspec_kind)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": self._rate, "lr_name": "control"}]


class ControlNetTraining(ControlTraining):
    """ControlNet (L. Zhang and others, arXiv:2302.05543), for all families: a copy of the U-Net's encoder that learns,
    whose outputs are added to the frozen U-Net.
    """

    def __init__(self, settings: Settings, family: ModelFamily, parts: ModelParts) -> None:
        net = _first_net(settings[ControlNetOptions].controlnet_model_name_or_path, parts)  # before the U-Net is fp8
        super().__init__(settings, parts, modelspec_kind="control-net")
        set_attention(net, attention_kind(settings[PrecisionOptions]))
        keep_less_for_backward(net)
        self._family = family
        self._spec = parts.spec.unet
        self._net = net
        self.module = cast(nn.Module, net).requires_grad_(True)

    def why_no_multiplier(self) -> str:
        return "is for networks, a ControlNet in training has no strength"

    def enable_gradient_checkpointing(self) -> None:
        set_gradient_checkpointing(self.module)

    def residuals(
        self, batch: Batch, noisy_BCHW: Tensor, timesteps_B: Tensor, condition: TextCondition, geometry: Geometry
    ) -> ControlResiduals:
        guide_BCHW = conditioning_images(batch) / 2 + 0.5
        return self._family.predict_control(
            self.module, noisy_BCHW, timesteps_B, condition, geometry, guide_BCHW=guide_BCHW.to(noisy_BCHW)
        )

    def preview_extension(self) -> Extension:
        return ControlNets(self._family, [self.module], [Use()])

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], counters: Mapping[str, int]) -> None:
        save_control(Path(path), self._net, self._spec, dtype, metadata)

    def check(self, path: Path) -> list[str]:
        net = load_control(path, self._spec, Target(torch.float32, "meta"))
        count = sum(1 for _ in net.parameters())
        return [f"{path.name}: ControlNet of {count} tensors"]


def _first_net(given: str | None, parts: ModelParts) -> ControlNetModel:
    """The ControlNet that training begins with, in float32; without weights if the model has none."""
    target = Target(torch.float32, parts.unet.device)
    if given is None:
        return fresh_control(parts.unet, parts.spec.unet, target)
    net = load_control(Path(given).expanduser(), parts.spec.unet, target, parts.unet)
    take_rgb(net)
    return net


class LLLiteTraining(ControlTraining):
    """ControlNet-LLLite, for SDXL: a small net at each layer that takes part in attention."""

    def __init__(self, settings: Settings, family: ModelFamily, parts: ModelParts) -> None:
        super().__init__(settings, parts, modelspec_kind="control-net-lllite")
        options = settings[LLLiteOptions]
        self._networks = lllite_networks()
        self._net = self._networks.create_lllite(
            parts.unet, options.cond_emb_dim, options.network_dim, options.network_dropout, options.network_weights
        )
        self._net.attach()
        self.module = cast(nn.Module, self._net)

    def on_micro_batch(self, network_multiplier: float) -> None:
        self._net.multiplier = network_multiplier
        self._net.set_condition(None)  # that of the batch before, whose graph it would keep

    def enable_gradient_checkpointing(self) -> None:
        self._net.recomputes = True

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], counters: Mapping[str, int]) -> None:
        with atomic_path(path) as temporary:
            self.module.save_weights(temporary, dtype, metadata)  # type: ignore[operator]

    def residuals(
        self, batch: Batch, noisy_BCHW: Tensor, timesteps_B: Tensor, condition: TextCondition, geometry: Geometry
    ) -> None:
        """Nothing is added to the U-Net's own blocks: the net sits at its layers and gets the pictures."""
        self._net.set_condition(conditioning_images(batch))

    def preview_extension(self) -> Extension:
        return LLLiteNets([self._net], [Use()])

    def check(self, path: Path) -> list[str]:
        found = check_network_file(path, self._networks.inspect_weights)
        return [f"{found.file}: ControlNet-LLLite at {found.modules} layers", *found.problems]

    def recorded_options(self) -> dict[str, Any]:
        return {"cond_emb_dim": self._net.size.cond_width, "network_dim": self._net.size.inner_width}


def conditioning_images(batch: Batch) -> Tensor:
    """The conditioning pictures (B, 3, pixels, pixels) in -1..1 that a net has to learn from. Raises UserError."""
    if batch.conditioning_images_BCHW is None:
        raise UserError("--dataset_class: its batches must have conditioning_images_BCHW: a ControlNet is trained here")
    return batch.conditioning_images_BCHW
