"""The metadata JSON of fine-tuning data sets: image keys with captions, tags and training sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.formats import IMAGE_EXTENSIONS
from library.data.index import FolderContent
from library.data.records import LATENT_STRIDE, Size
from library.log import UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of the file. ``train_resolution`` is the size at which its latents were prepared, if they were."""

    key: str
    caption: str
    train_resolution: Size | None


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """Where an entry's files are: the folder's content with the image's name in it, and the latents' path."""

    content: FolderContent | None
    image_name: str | None
    npz_path: str | None


def read_metadata(path: str) -> list[Entry]:
    """The entries in file order. Raises UserError with all problems of the file, one a line."""
    document = read_document(path)
    if not isinstance(document, dict) or not document:
        raise UserError(f"metadata file {path}: must be an object with one entry for each image")
    entries: list[Entry] = []
    problems: list[str] = []
    for key, fields in document.items():
        try:
            entries.append(_read_entry(str(key), fields))
        except ValueError as error:
            problems.append(f"metadata file {path}: image {key!r}: {error}")
    if problems:
        raise UserError.of(problems)
    return entries


def read_document(path: str | Path) -> Any:
    """What the JSON of a metadata file holds, whatever it is. Raises UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"metadata file {path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"metadata file {path}: {error}") from error


def _read_entry(key: str, fields: Any) -> Entry:
    if not isinstance(fields, Mapping):
        raise ValueError("must be an object")
    caption, tags = fields.get("caption"), fields.get("tags")
    for name, value in (("caption", caption), ("tags", tags)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a text")
    text = ", ".join(part for part in (caption, tags) if part)
    return Entry(key, text, _read_size(fields.get("train_resolution")))


def _read_size(value: Any) -> Size | None:
    match value:
        case None:
            return None
        case [int(width), int(height)] if min(width, height) >= LATENT_STRIDE:
            return width // LATENT_STRIDE * LATENT_STRIDE, height // LATENT_STRIDE * LATENT_STRIDE
        case _:
            raise ValueError("train_resolution must be [width, height] in pixels")


class FileFinder:
    """Finds the files of metadata keys: below the image folder first, and a key that is a path also by itself.

    ``read_folder`` gives a folder's content, or None if there is no such folder; it is asked often for the same.
    """

    def __init__(self, image_dir: str | None, read_folder: Callable[[str], FolderContent | None]) -> None:
        self._image_dir = image_dir
        self._read_folder = read_folder
        self._names_by_stem: dict[str, dict[str, str]] = {}

    def find(self, key: str) -> FoundFiles:
        """The image and the prepared latents of a key; both may be missing."""
        image: tuple[FolderContent, str] | None = None
        npz_path: str | None = None
        for place in self._places(key):
            folder, name = os.path.split(place)
            content = self._read_folder(folder or ".")
            if content is None:
                continue
            stem = _without_image_extension(name)
            if image is None and (found := self._image_name(content, name, stem)) is not None:
                image = content, found
            if npz_path is None and f"{stem}.npz" in content.npz_names:
                npz_path = content.path(f"{stem}.npz")
        return FoundFiles(*(image or (None, None)), npz_path)

    def _places(self, key: str) -> Iterator[str]:
        if self._image_dir is not None and not os.path.isabs(key):
            yield os.path.join(self._image_dir, key)
        if os.path.isabs(key) or _without_image_extension(key) != key:
            yield key

    def _image_name(self, content: FolderContent, name: str, stem: str) -> str | None:
        """The image of that very name, or else the first in order of those with that stem."""
        if name in content.images or name in content.bad_images:
            return name
        if content.folder not in self._names_by_stem:
            names: dict[str, str] = {}
            for image in (*content.images, *content.bad_images):
                names.setdefault(_without_image_extension(image), image)
            self._names_by_stem[content.folder] = names
        return self._names_by_stem[content.folder].get(stem if name == stem else name)


def _without_image_extension(name: str) -> str:
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in IMAGE_EXTENSIONS else name
