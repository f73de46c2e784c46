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
