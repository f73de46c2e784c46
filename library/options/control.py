"""Options of nets that learn to draw after pictures: where the pictures are, and how large the net is."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class ConditioningOptions(OptionGroup):
    """Conditioning pictures of a data set that stands on the command line."""

    title: ClassVar[str] = "Conditioning pictures"

    conditioning_data_dir: str | None = option(
        None,
        help="folder with a conditioning picture of the name of each image; train_data_dir is then the folder of the"
        " images themselves",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions(OptionGroup):
    """The kind of model that a ControlNet is for, and its beginning."""

    title: ClassVar[str] = "ControlNet"

    sdxl: bool = option(False, help="the base model is SDXL")
    controlnet_model_name_or_path: str | None = option(
        None,
        help="ControlNet to start from, a file or a Diffusers folder; when absent, a copy of the U-Net's encoder",
        metavar="NET",
    )


@dataclass(frozen=True, kw_only=True)
class ControlFileOptions(OptionGroup):
    """The form of saved ControlNets."""

    title: ClassVar[str] = "File format"

    save_model_as: Literal["ckpt", "pt", "safetensors", "diffusers"] | None = option(
        "safetensors", help="form of saved nets: one file, or a Diffusers folder"
    )


@dataclass(frozen=True, kw_only=True)
class LLLiteOptions(OptionGroup):
    """Size and beginning of a ControlNet-LLLite."""

    title: ClassVar[str] = "ControlNet-LLLite"

    cond_emb_dim: int | None = option(
        None,
        ge=2,
        multiple_of=2,
        help="width of what is made of the conditioning picture; when absent that of network_weights, else 32",
    )
    network_dim: int | None = option(
        None, ge=1, help="inner width of each layer's net; when absent that of network_weights, else 64"
    )
    network_dropout: float | None = option(None, ge=0, lt=1, help="dropout probability inside the nets")
    network_weights: str | None = option(None, help="ControlNet-LLLite file to start from", metavar="FILE")
