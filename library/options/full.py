"""Options of full fine-tuning: which parts of the model itself learn, at which rates."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import OptionGroup, option
from library.options.values import rate_list

UNET_BLOCKS_SDXL = 23


@dataclass(frozen=True, kw_only=True)
class FullOptions(OptionGroup):
    """What all scripts that train the model itself have."""

    title: ClassVar[str] = "Full fine-tuning"

    fused_backward_pass: bool = option(
        False,
        help="change each weight as soon as its gradient is there, in the backward pass, and drop the gradient: much"
        " less memory; one process, no accumulation, not with fp16",
    )
    diffusers_xformers: bool = option(False, help="the same as xformers")


@dataclass(frozen=True, kw_only=True)
class SdxlFullOptions(FullOptions):
    """Parts and rates of SDXL."""

    train_text_encoder: bool = option(False, help="train the text encoders too")
    learning_rate_te1: float | None = option(
        None, ge=0, help="learning rate of text encoder 1; learning_rate when absent, 0 freezes it"
    )
    learning_rate_te2: float | None = option(
        None, ge=0, help="learning rate of text encoder 2; learning_rate when absent, 0 freezes it"
    )
    block_lr: tuple[float, ...] | None = option(
        None,
        convert=rate_list(UNET_BLOCKS_SDXL),
        help="23 learning rates, separated by commas, one for each block of the U-Net; 0 freezes a block",
        metavar="RATES",
    )
