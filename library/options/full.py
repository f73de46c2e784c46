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
class SdFullOptions(FullOptions):
    """What train_db.py and fine_tune.py share."""

    learning_rate_te: float | None = option(
        None, ge=0, help="learning rate of the text encoder; learning_rate when absent, 0 freezes it"
    )


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(SdFullOptions):
    """The text encoder of train_db.py, which learns unless it is told not to."""

    title: ClassVar[str] = "DreamBooth"

    stop_text_encoder_training: int | None = option(
        None,
        help="train the text encoder only up to this step; 0 or less never trains it, absent means to the end",
        metavar="STEP",
    )
    no_token_padding: bool = option(
        False, help="pad captions only to the longest of their batch, not to 77 tokens; not in previews"
    )


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(SdFullOptions):
    """The text encoder of fine_tune.py."""

    title: ClassVar[str] = "Fine-tuning"

    train_text_encoder: bool = option(False, help="train the text encoder too")


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
