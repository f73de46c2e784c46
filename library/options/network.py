# ruff: noqa: RUF009 - option() declares a field
"""Options of the trained network (LoRA and others)."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OptionGroup):
    """The network that is trained beside the frozen base model."""

    title: ClassVar[str] = "Network"

    network_module: str | None = option(None, help="module of the network to train: networks.lora", metavar="MODULE")
    network_dim: int | None = option(None, ge=1, help="rank; the network module decides when absent (4 for LoRA)")
    network_alpha: float = option(1, ge=0, help="the network's effect is scaled by alpha/rank")
    network_dropout: float | None = option(None, ge=0, lt=1, help="dropout probability inside the network")
    network_args: list[str] | None = option(
        None, pairs="word", help="arguments of the network module: conv_dim=4 conv_alpha=1"
    )
    network_weights: str | None = option(None, help="network file to start from", metavar="FILE")
    dim_from_weights: bool = option(False, help="take ranks and alphas from network_weights")
    network_train_unet_only: bool = option(False, help="train the U-Net's part of the network only")
    network_train_text_encoder_only: bool = option(False, help="train the text encoder's part of the network only")
    unet_lr: float | None = option(None, ge=0, help="learning rate of the U-Net's part; 0 freezes it")
    text_encoder_lr: list[float] | None = option(
        None, ge=0, help="learning rate of the text encoder's part, one for all encoders or one each; 0 freezes it"
    )
    scale_weight_norms: float | None = option(
        None, ge=0, help="upper limit for the norm of each weight change, kept after every step; 0 is off"
    )
    base_weights: list[str] | None = option(
        None, help="network files merged into the base model before training", metavar="FILE"
    )
    base_weights_multiplier: list[float] | None = option(None, help="multiplier of each of base_weights; 1 when absent")
