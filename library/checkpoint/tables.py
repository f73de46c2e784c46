"""The key table of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Container

from library.checkpoint import sd_keys, sdxl_keys
from library.checkpoint.keymap import KeyMap
from library.models.spec import ArchitectureSpec


def key_map(spec: ArchitectureSpec, present: Container[str] = ()) -> KeyMap:
    """The table for writing a single file of this architecture, or for reading one with the keys ``present``."""
    return sdxl_keys.key_map(spec, present) if spec.family == "sdxl" else sd_keys.key_map(spec)
