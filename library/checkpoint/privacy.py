"""What must not enter a file that is given away: the folders of the machine that it was made on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any


def without_folders(value: Any) -> Any:
    """The same value with every absolute path cut down to its last part."""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, str):
        head, equals, tail = value.partition("=")  # arguments are of the form key=value
        return head + equals + _last_part(tail) if equals and head.isidentifier() else _last_part(value)
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_folders(item) for item in value)
    return value


def _last_part(text: str) -> str:
    is_path = (text.startswith("/") or PureWindowsPath(text).is_absolute()) and "\n" not in text
    return (PureWindowsPath(text).name or text) if is_path else text
