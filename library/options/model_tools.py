# ruff: noqa: RUF009 - option() declares a field
"""Options of the tools that merge and convert whole models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option

Precision = Literal["float", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class MergeModelsOptions(OptionGroup):
    """The weighted mean of checkpoints."""

    title: ClassVar[str] = "Merging of models"

    models: list[str] | None = option(None, help="checkpoint files of one family", metavar="FILE")
    output: str | None = option(None, help="file to write; .safetensors is added when missing", metavar="FILE")
    ratios: list[float] | None = option(None, help="weight of each model; equal shares when absent")
    unet_only: bool = option(False, help="merge the U-Net; text encoders and VAE are those of the first model")
    device: str = option("cpu", help="device of the arithmetic", metavar="DEVICE")
    precision: Precision = option("float", help="type of the arithmetic")
    saving_precision: Precision = option("float", help="type of the saved tensors")
    show_skipped: bool = option(False, help="list the tensors that the first model lacks")


@dataclass(frozen=True, kw_only=True)
class ConvertModelOptions(OptionGroup):
    """Between checkpoint files and Diffusers folders."""

    title: ClassVar[str] = "Conversion of a model"

    model_to_load: str | None = option(
        None, help="checkpoint file, Diffusers folder or hub id", positional=True, metavar="MODEL"
    )
    model_to_save: str | None = option(
        None,
        help="name ending in .safetensors or .ckpt: a checkpoint file; any other: a Diffusers folder",
        positional=True,
        metavar="MODEL",
    )
    v1: bool = option(False, help="the model is of the SD 1.x family; found out by itself, a wrong word is refused")
    v2: bool = option(False, help="the same for SD 2.x")
    sdxl: bool = option(False, help="the same for SDXL")
    v_parameterization: bool = option(
        False, help="the model predicts velocity; only needed for files that do not say so themselves"
    )
    unet_use_linear_projection: bool = option(
        False,
        help="Diffusers folders always have the transformers' projections of SD 2.x as matrices; changes nothing",
    )
    fp16: bool = option(False, help="save in fp16")
    bf16: bool = option(False, help="save in bf16")
    float: bool = option(False, help="save in float32")
    save_precision_as: Precision | None = option(None, help="the same in one option; as the model is when absent")
    epoch: int = option(0, ge=0, help="number of epochs that a .ckpt file records")
    global_step: int = option(0, ge=0, help="number of steps that a .ckpt file records")
    metadata: str | None = option(None, help='entries of a safetensors file as JSON: {"key": "value"}', metavar="JSON")
    variant: str | None = option(None, help="variant of the Diffusers files to read (fp16)", metavar="NAME")
    reference_model: str | None = option(
        None, help="Diffusers folder whose tokenizer and scheduler are copied to a written folder", metavar="DIR"
    )
    use_safetensors: bool = option(False, help="Diffusers folders are always written in safetensors; changes nothing")
