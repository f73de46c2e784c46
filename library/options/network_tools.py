# ruff: noqa: RUF009 - option() declares a field
"""Options of the tools that change and examine network files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option

ToolPrecision = Literal["float", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class MetadataToolOptions(OptionGroup):
    """Showing and editing the metadata of safetensors files."""

    title: ClassVar[str] = "Metadata of a file"

    model: str | None = option(None, help="safetensors file whose metadata is printed or edited", metavar="FILE")
    parsed: bool = option(False, help="print entries that hold JSON as JSON, not as text")
    set: list[str] | None = option(None, help="entries to add or change", pairs=True)
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
