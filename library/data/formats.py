"""Which files are pictures, and the packages with which Pillow reads the rarer ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass


def _jpeg_xl() -> None:
    import pillow_jxl  # pyright: ignore[reportMissingImports, reportUnusedImport]  # noqa: F401


def _heif() -> None:
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()


@dataclass(frozen=True, slots=True)
class _PlugIn:
    """A package that teaches Pillow a format, by the name that pip knows."""

    format: str
    package: str
    register: Callable[[], None]


_HEIC = _PlugIn("HEIC", "pillow-heif", _heif)
_PLUG_INS = {".jxl": _PlugIn("JPEG XL", "pillow-jxl-plugin", _jpeg_xl), ".heic": _HEIC, ".heif": _HEIC}

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff", *_PLUG_INS)
"""Read in any spelling (``.JPG``, ``.Jpg``). Formats that need a package that is missing are reported, not passed
over.
"""


def needs_plug_in(path: str) -> bool:
    """True for a file name of a format that Pillow alone does not read."""
    return _extension(path) in _PLUG_INS


def missing_plug_in(path: str) -> str | None:
    """Let Pillow know the format of this file name. Returns what has to be installed, in words, or None."""
    plug_in = _PLUG_INS.get(_extension(path))
    if plug_in is None:
        return None
    try:
        plug_in.register()
    except ImportError:
        return f"{plug_in.format} needs a package: pip install {plug_in.package}; or save it as JPEG or PNG"
    return None


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()
