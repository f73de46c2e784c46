"""A metadata file as the tools change it: fields that they do not know are kept, the file is whole at any time.

Its form is the reference's to the byte: an object with one entry for each image, two blanks of indentation, letters
outside ASCII escaped. Training reads it with `library.data.metadata_json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from library.checkpoint.io import atomic_write_text
from library.data.metadata_json import read_document
from library.log import UserError

SAVE_EVERY = 1000
"""Changed images between two saves; a tenth of the file if that is more, so that saving costs a fixed share."""


class MetadataFile:
    """The entries of a metadata file in memory, saved to ``target`` every now and then and at the end (`save`)."""

    def __init__(self, target: str, entries: dict[str, dict[str, Any]]) -> None:
        self.entries = entries
        self._target = Path(target).expanduser()
        self._unsaved = 0

    @classmethod
    def open(cls, target: str, source: str | None = None) -> MetadataFile:
        """Begin with ``source``; without one with ``target`` if it exists, else with nothing. Raises UserError."""
        if source is not None:
            return cls(target, _read(Path(source).expanduser()))
        existing = Path(target).expanduser()
        return cls(target, _read(existing) if existing.exists() else {})

    def set(self, key: str, field: str, value: Any) -> None:
        """Set a field of an image, which may be new."""
        self.entries.setdefault(key, {})[field] = value
        self._unsaved += 1
        if self._unsaved >= max(SAVE_EVERY, len(self.entries) // 10):
            self.save()

    def text(self, key: str, field: str) -> str | None:
        """A field of an image; None if it is missing or no text."""
        value = self.entries[key].get(field)
        return value if isinstance(value, str) else None

    def save(self) -> None:
        """Write the file, whole or not at all. Raises `library.checkpoint.io.WriteError`."""
        atomic_write_text(self._target, json.dumps(self.entries, indent=2))
        self._unsaved = 0


def _read(path: Path) -> dict[str, dict[str, Any]]:
    document = read_document(path)
    wrong = not isinstance(document, dict) or [key for key, entry in document.items() if not isinstance(entry, dict)]
    if wrong:
        where = f"image {wrong[0]!r}" if isinstance(wrong, list) else "the file"
        raise UserError(f"metadata file {path}: {where} must be an object of fields")
    return document
