"""What lies in one image folder: names, sizes and captions, found in one scan and remembered for the next start.

The memory is a file beside the images (``.image_index.json``), or in the user's cache folder if that one is read-
only. An entry counts only while the file's length and time of change are the same. Decoding pixels is not the
business of this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.checkpoint.hashes import cache_folder
from library.checkpoint.io import atomic_write_text
from library.data.formats import IMAGE_EXTENSIONS
from library.data.headers import BadFile, measure
from library.data.records import ImageProblem, Size

CAPTION_EXTENSIONS = (".caption", ".txt")
"""Tried in this order when no caption extension is given."""

INDEX_NAME = ".image_index.json"
_INDEX_VERSION = 1
_WORTH_REMEMBERING = 200  # files; fewer are read again faster than the user wonders about the new file
_DIGITS = re.compile(r"(\d+)")
_Stamp = tuple[int, int]  # length in bytes, time of change in ns
_NOWHERE: _Stamp = (-1, -1)


@dataclass(frozen=True, slots=True)
class Caption:
    """The first line of a caption file, stripped, and whether more lines with text follow."""

    text: str
    has_more_lines: bool


@dataclass(frozen=True)
class FolderContent:
    """The visible files of one folder, by file name, images in natural order (``2.png`` before ``10.png``).

    ``others`` holds the names of all files that are neither pictures nor archives, captions too.
    """

    folder: str
    images: Mapping[str, Size]
    captions: Mapping[str, Caption]
    npz_names: frozenset[str]
    others: frozenset[str]
    bad_images: Mapping[str, ImageProblem] = field(default_factory=dict)
    bad_captions: Mapping[str, ImageProblem] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """The path of a file of this folder."""
        return os.path.join(self.folder, name)


def read_folder(folder: str, caption_extensions: Iterable[str]) -> FolderContent:
    """Find and measure the images of a folder (not of its subfolders) and read the captions with the given extensions.

    Sizes are those after EXIF orientation. Hidden files are passed over. Raises OSError if the folder cannot be read.
    """
    listing = _scan(folder, tuple(caption_extensions))
    memory = _Memory.load(folder)
    images: dict[str, Size] = {}
    bad_images: dict[str, ImageProblem] = {}
    for name in sorted(listing.images, key=natural_key):
        try:
            images[name] = memory.size_of(name, listing.images[name])
        except BadFile as error:
            bad_images[name] = ImageProblem(os.path.join(folder, name), str(error))
    captions: dict[str, Caption] = {}
    bad_captions: dict[str, ImageProblem] = {}
    for name, stamp in listing.captions.items():
        try:
            captions[name] = memory.caption_of(name, stamp)
        except BadFile as error:
            bad_captions[name] = ImageProblem(os.path.join(folder, name), str(error), is_caption=True)
    memory.save(len(images) + len(captions))
    return FolderContent(
        folder, images, captions, frozenset(listing.npz), frozenset(listing.others), bad_images, bad_captions
    )


def image_names(folder: str) -> list[str]:
    """The names of a folder's images, in natural order, by the rule of `read_folder`; no file is opened.

    Raises OSError if the folder cannot be read.
    """
    return sorted(_scan(folder, ()).images, key=natural_key)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A sorting key that takes runs of digits as numbers and ignores case."""
    parts = _DIGITS.split(name.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


@dataclass
class _Listing:
    images: dict[str, _Stamp] = field(default_factory=dict)
    captions: dict[str, _Stamp] = field(default_factory=dict)
    npz: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def _scan(folder: str, caption_extensions: tuple[str, ...]) -> _Listing:
    listing = _Listing()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            extension = name[name.rfind(".") :].lower()
            is_image, is_caption = extension in IMAGE_EXTENSIONS, name.endswith(caption_extensions)
            if extension == ".npz":
                listing.npz.append(name)
            elif not is_image:
                listing.others.append(name)
            if is_image or is_caption:
                stamp = _stamp(entry)
                if stamp is not None:
                    (listing.images if is_image else listing.captions)[name] = stamp
    return listing


def _stamp(entry: os.DirEntry[str]) -> _Stamp | None:
    """What tells that a file was changed; None if the entry is none. A link that leads nowhere is a file that cannot be
    read.
    """
    # is_file() raises for links that lead in a circle
    if os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
        stat = entry.stat()
        return stat.st_size, stat.st_mtime_ns
    return _NOWHERE if entry.is_symlink() and not os.path.exists(entry.path) else None


def _read_caption(path: str) -> Caption:
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise BadFile(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    first, _, rest = text.replace("\r\n", "\n").replace("\r", "\n").partition("\n")
    return Caption(first.strip(), bool(rest.strip()))


class _Memory:
    """What an earlier start found out about the files of a folder, and what this one adds."""

    def __init__(self, folder: str, old: dict[str, dict[str, Any]]) -> None:
        self._folder = folder
        self._old = old
        self._new: dict[str, dict[str, Any]] = {"images": {}, "captions": {}}
        self._learned = 0

    @classmethod
    def load(cls, folder: str) -> _Memory:
        for path in _memory_paths(folder):
            try:
                content = json.loads(Path(path).read_bytes())
                if content["version"] == _INDEX_VERSION:
                    return cls(folder, {"images": dict(content["images"]), "captions": dict(content["captions"])})
            except (OSError, ValueError, TypeError, KeyError):
                continue  # missing or damaged: everything is found out anew
        return cls(folder, {"images": {}, "captions": {}})

    def size_of(self, name: str, stamp: _Stamp) -> Size:
        entry: Any = self._old["images"].get(name)
        if _is_current(entry, stamp):
            self._new["images"][name] = entry
            return entry[2], entry[3]
        size = measure(os.path.join(self._folder, name))
        self._learned += 1
        self._new["images"][name] = [*stamp, *size]
        return size

    def caption_of(self, name: str, stamp: _Stamp) -> Caption:
        entry: Any = self._old["captions"].get(name)
        if _is_current(entry, stamp):
            self._new["captions"][name] = entry
            return Caption(entry[2], entry[3])
        caption = _read_caption(os.path.join(self._folder, name))
        self._learned += 1
        self._new["captions"][name] = [*stamp, caption.text, caption.has_more_lines]
        return caption

    def save(self, file_count: int) -> None:
        if file_count < _WORTH_REMEMBERING or not (self._learned or self._is_shorter()):
            return
        text = json.dumps({"version": _INDEX_VERSION, **self._new}, ensure_ascii=False, separators=(",", ":"))
        for path in _memory_paths(self._folder):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(path, text, durable=False)
                return
            except OSError:
                continue  # a read-only folder: the next place, or no memory at all; the images were found in any case

    def _is_shorter(self) -> bool:
        return any(len(self._new[kind]) < len(self._old[kind]) for kind in self._new)


def _is_current(entry: Any, stamp: _Stamp) -> bool:
    return isinstance(entry, list) and len(entry) == 4 and entry[0] == stamp[0] and entry[1] == stamp[1]


def _memory_paths(folder: str) -> tuple[Path, Path]:
    digest = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(folder, INDEX_NAME), cache_folder() / "image_index" / f"{digest}.json"
