# ruff: noqa: RUF009 - option() declares a field
"""Options of the tools that change and examine network files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option

ToolPrecision = Literal["float", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class MergeFilesOptions(OptionGroup):
    """What all merging tools have: what is merged, how strong, where to."""

    title: ClassVar[str] = "Merge networks"

    save_precision: ToolPrecision | None = option(None, help="type of saved tensors; that of precision when absent")
    precision: ToolPrecision = option(
        "float", help="type of saved tensors where save_precision is absent; computed in float32 always"
    )
    save_to: str | None = option(None, help="file (a model: also Diffusers folder) to write", metavar="FILE")
    models: list[str] | None = option(None, help="network files to merge", metavar="FILE")
    ratios: list[float] | None = option(None, help="weight of each of models; 1 when absent")
    block_weights: list[str] | None = option(
        None,
        help="more factors for each of models: text_encoder_mul=N;unet_mul=N;block_mul=N,N,... or the blocks' alone",
        metavar="ARGS",
    )
    no_metadata: bool = option(False, help="leave out the modelspec entries; what programs need to read the file stays")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionGroup):
    """Merging networks into a model, or with each other."""

    title: ClassVar[str] = "Merge into a model, or networks with each other"

    sd_model: str | None = option(
        None,
        help="model to merge into, a file or a Diffusers folder; when absent the networks are merged with each other",
        metavar="MODEL",
    )
    new_rank: int | None = option(
        None, ge=1, help="reduce merged networks to this rank; when absent the sum of the ranks, which is exact"
    )
    concat: bool = option(False, help="accepted; merged networks are stacked, which is exact, in any case")
    shuffle: bool = option(False, help="mix the ranks by a random rotation; the result stays the same")
    seed: int | None = option(None, ge=0, help="seed of shuffle; drawn anew when absent")


@dataclass(frozen=True, kw_only=True)
class SecondVersionOptions(OptionGroup):
    """What the files say by themselves."""

    title: ClassVar[str] = "Kind of model"

    v2: bool = option(False, help="the model is of the SD 2.x family; told by the files, checked only")


@dataclass(frozen=True, kw_only=True)
class SvdMergeOptions(OptionGroup):
    """Merging networks to a rank of choice."""

    title: ClassVar[str] = "Merge networks to a new rank"

    new_rank: int = option(4, ge=1, help="rank of the merged network")
    new_conv_rank: int | None = option(
        None, ge=1, help="the same for convolutions with a kernel larger than 1x1; new_rank when absent"
    )
    clamp_quantile: float = option(
        1.0, gt=0, le=1, help="cut values beyond this quantile of their sizes; 1 cuts nothing"
    )
    device: str | None = option(None, help="where to compute, for example cuda; the CPU when absent", metavar="DEVICE")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OptionGroup):
    """Names of network files."""

    title: ClassVar[str] = "Convert a network"

    model: str | None = option(None, help="network file to convert", metavar="FILE")
    save_to: str | None = option(None, help="file to write", metavar="FILE")
    to: Literal["kohya", "kohya_diffusers", "diffusers"] = option(
        "kohya",
        help="kohya: names of this program (SDXL: Stability blocks); kohya_diffusers: the same with Diffusers blocks;"
        " diffusers: names of Diffusers and PEFT",
    )
    save_precision: ToolPrecision | None = option(None, help="type of saved tensors; as they are when absent")


@dataclass(frozen=True, kw_only=True)
class MetadataToolOptions(OptionGroup):
    """Showing and editing the metadata of safetensors files."""

    title: ClassVar[str] = "Metadata of a file"

    model: str | None = option(None, help="safetensors file whose metadata is printed or edited", metavar="FILE")
    parsed: bool = option(False, help="print entries that hold JSON as JSON, not as text")
    set: list[str] | None = option(None, help="entries to add or change", pairs="text")
    remove: list[str] | None = option(None, help="keys of entries to take out", metavar="KEY")
    strip: bool = option(
        False, help="keep only what training keeps with no_metadata, and what programs need to read the file"
    )
    from_json: str | None = option(
        None, help="JSON file whose entries replace all, as this tool prints them", metavar="FILE"
    )
    save_to: str | None = option(
        None, help="safetensors file to write; without it the file itself is changed", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(OptionGroup):
    """Changing the rank of a network."""

    title: ClassVar[str] = "Resize a network"

    save_precision: ToolPrecision | None = option(None, help="type of saved tensors; float when absent")
    new_rank: int = option(4, ge=1, help="target (with dynamic_method the largest) rank")
    new_conv_rank: int | None = option(
        None, ge=1, help="the same for convolutions with a kernel larger than 1x1; new_rank when absent"
    )
    save_to: str | None = option(None, help="file to write: .safetensors, .ckpt, .pt or .pth", metavar="FILE")
    model: str | None = option(None, help="network file to resize", metavar="FILE")
    device: str | None = option(None, help="where to compute, for example cuda; the CPU when absent", metavar="DEVICE")
    verbose: bool = option(False, help="print for each layer what is kept")
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = option(
        None, help="choose the rank of each layer by its singular values"
    )
    dynamic_param: float | None = option(
        None,
        gt=0,
        help="sv_ratio: keep singular values larger than the largest over this; sv_fro and sv_cumulative: the share to"
        " keep, up to 1",
    )


@dataclass(frozen=True, kw_only=True)
class DyloraSplitOptions(OptionGroup):
    """Cutting a DyLoRA into networks of fixed ranks."""

    title: ClassVar[str] = "Split a DyLoRA"

    unit: int | None = option(None, ge=1, help="step of the ranks at which it is cut, as in its training")
    save_to: str | None = option(None, help="base name; -0004 and so on (the rank) is appended", metavar="FILE")
    model: str | None = option(None, help="DyLoRA file", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class CheckOptions(OptionGroup):
    """Looking into a network file."""

    title: ClassVar[str] = "Check a network"

    file: str | None = option(None, help="network file to examine", metavar="FILE", positional=True)
    show_all_keys: bool = option(False, help="list every tensor, not only lora_up and lora_down", short="s")


@dataclass(frozen=True, kw_only=True)
class InterrogatorOptions(OptionGroup):
    """Finding the words that a network learnt."""

    title: ClassVar[str] = "Interrogate a network"

    v2: bool = option(False, help="the base model is of the SD 2.x family; it is recognised anyway")
    sd_model: str | None = option(
        None, help="base model that the network is compared on: file or Diffusers folder", metavar="MODEL"
    )
    model: str | None = option(None, help="network file to examine", metavar="FILE")
    batch_size: int = option(16, ge=1, help="tokens encoded together")
    clip_skip: int | None = option(
        None, ge=1, help="compare the n-th hidden layer from the end; absent: the one that the model uses"
    )


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(OptionGroup):
    """A network from the difference of two models."""

    title: ClassVar[str] = "Extract a network from two models"

    v2: bool = option(False, help="the models are of the SD 2.x family; they are recognised anyway")
    v_parameterization: bool | None = option(
        None, help="say in the metadata that the model predicts velocity; absent: as the original model says"
    )
    sdxl: bool = option(False, help="the models are SDXL; they are recognised anyway")
    load_precision: ToolPrecision | None = option(
        None, help="round weights to this type before they are compared; as they are in the files when absent"
    )
    save_precision: ToolPrecision | None = option(None, help="type of saved tensors; float when absent")
    model_org: str | None = option(None, help="original model: file or Diffusers folder", metavar="MODEL")
    model_tuned: str | None = option(
        None,
        help="tuned model: file or Diffusers folder; the network approximates tuned minus original",
        metavar="MODEL",
    )
    save_to: str | None = option(None, help="network file to write: .safetensors, .ckpt or .pt", metavar="FILE")
    dim: int = option(4, ge=1, help="rank of the network")
    conv_dim: int | None = option(
        None, ge=1, help="rank for 3x3 convolutions; with it the rest of the U-Net's blocks takes part too"
    )
    device: str | None = option(None, help="where to compute, for example cuda; the CPU when absent", metavar="DEVICE")
    clamp_quantile: float = option(
        1.0, gt=0, le=1, help="cut values of the factors at this quantile of their sizes; 1 cuts nothing"
    )
    min_diff: float = option(
        0.01, ge=0, help="text encoders take part if a weight of their layers differs by more than this"
    )
    exact: bool = option(False, help="exact singular values instead of randomised ones with a bound: slower")
    no_metadata: bool = option(False, help="leave out the modelspec entries; what programs need to read the file stays")
    load_original_model_to: str | None = option(
        None, help="accepted and without effect: weights are read one by one", metavar="DEVICE"
    )
    load_tuned_model_to: str | None = option(
        None, help="accepted and without effect: weights are read one by one", metavar="DEVICE"
    )
