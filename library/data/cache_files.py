"""npz archives of the caches, opened member by member. What an archive means is decided in `cache` and `text_cache`.

Archives come from us, from the reference, or from a killed process of either: everything read is checked for size and
form, nothing is unpickled, and whatever cannot be read is `BrokenArchive`.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.checkpoint.io import atomic_path
from library.data.records import LATENT_STRIDE, Size

LATENTS = "latents"
LATENTS_FLIPPED = "latents_flipped"
ORIGINAL_SIZE = "original_size"
CROP_LTRB = "crop_ltrb"
ALPHA_MASK = "alpha_mask"  # written by others; read only where no image lies beside the archive
FINGERPRINT = "fingerprint"  # ours; other readers do not look for it
REQUIRED = (LATENTS, ORIGINAL_SIZE, CROP_LTRB)

LATENT_CHANNELS = 4

_MAX_MEMBER_BYTES = 1 << 28  # latents of 16,000 x 16,000 pixels; guards against archives made to fill the memory
_MAX_SMALL_BYTES = 1 << 16


class BrokenArchive(Exception):
    """The file is no npz archive, or a member cannot be read. ``is_damaged`` is False if the disk failed."""

    def __init__(self, message: str, *, is_damaged: bool = True) -> None:
        super().__init__(message)
        self.is_damaged = is_damaged


@dataclass(frozen=True, slots=True)
class ArchiveFacts:
    """What an archive says about itself, read without its large members.

    ``fingerprint``: what our own archives record, None in others'. ``shapes``: array shape by member name; only for
    archives without a fingerprint, as ours have the shapes that their fingerprint tells.
    """

    names: frozenset[str]
    fingerprint: dict[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    original_size: Size | None

    def is_complete(self, flipped: bool) -> bool:
        """True if all members are there, the mirrored latents too if ``flipped``."""
        return self.names.issuperset(REQUIRED) and (not flipped or LATENTS_FLIPPED in self.names)

    def fits(self, bucket: Size, flipped: bool) -> bool:
        """True if all members are there and the latents have the bucket's size, also the mirrored ones if asked."""
        wanted = latent_shape(bucket)
        right = all(self.shapes.get(name) == wanted for name in (LATENTS, *((LATENTS_FLIPPED,) if flipped else ())))
        return self.is_complete(flipped) and right


def latent_shape(bucket: Size) -> tuple[int, int, int]:
    """Shape CHW of the latents of a bucket."""
    return (LATENT_CHANNELS, bucket[1] // LATENT_STRIDE, bucket[0] // LATENT_STRIDE)


def read_facts(path: Path) -> ArchiveFacts | None:
    """Facts about an archive, or None if there is no file. Raises `BrokenArchive`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = frozenset(name[:-4] for name in archive.namelist() if name.endswith(".npy"))
            if FINGERPRINT in names:
                return ArchiveFacts(
                    names, parse_fingerprint(str(_read(archive, FINGERPRINT, _MAX_SMALL_BYTES))), {}, None
                )
            shapes = {name: _shape(archive, name) for name in names}
            size = _read(archive, ORIGINAL_SIZE, _MAX_SMALL_BYTES) if ORIGINAL_SIZE in names else None
            return ArchiveFacts(names, None, shapes, _as_size(size))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BrokenArchive(f"{path}: {error}", is_damaged=False) from error
    except _FORM_ERRORS as error:
        raise BrokenArchive(f"{path}: {error}") from error


def read_original_size(path: Path) -> Size | None:
    """The size of the image that an archive's latents were made of; None if it cannot be read."""
    try:
        return _as_size(read_array(path, ORIGINAL_SIZE))
    except BrokenArchive:
        return None


def _as_size(array: NDArray[Any] | None) -> Size | None:
    if array is None or array.shape != (2,) or array.dtype.kind not in "iuf" or not array.min() >= 1:
        return None
    return int(array[0]), int(array[1])


def read_array(path: Path, name: str) -> NDArray[Any]:
    """One member as an array; nothing else of the archive is read. Raises `BrokenArchive`."""
    return read_members(path, (name,))[name]


def read_members(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """The named members as arrays. Raises `BrokenArchive`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _read(archive, name, _MAX_MEMBER_BYTES) for name in names}
    except OSError as error:
        raise BrokenArchive(f"{path}: {error}", is_damaged=False) from error
    except _FORM_ERRORS as error:
        raise BrokenArchive(f"{path}: {error}") from error


def write_archive(path: Path, arrays: Mapping[str, NDArray[Any]], fingerprint: Mapping[str, Any]) -> None:
    """Write an archive whole or not at all. Raises `library.checkpoint.io.WriteError`."""
    text = np.array(json.dumps(fingerprint, sort_keys=True))
    # not flushed to the disk one by one: readers check each archive and make a broken one again
    with atomic_path(path, durable=False) as temporary:
        np.savez(temporary, allow_pickle=False, **dict(arrays), **{FINGERPRINT: text})  # pyright: ignore[reportArgumentType]


_FORM_ERRORS = (
    EOFError,
    ValueError,
    KeyError,
    MemoryError,
    RuntimeError,  # an encrypted archive; an unknown compression is its subclass NotImplementedError
    zipfile.BadZipFile,
    zlib.error,
)


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, _ = read(member)
        return tuple(shape)


def _read(archive: zipfile.ZipFile, name: str, most_bytes: int) -> NDArray[Any]:
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > most_bytes:
        raise ValueError(f"{name} takes {info.file_size:,} bytes")
    with archive.open(info) as member:
        array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # also makes zipfile compare the checksum
            raise ValueError(f"{name} is longer than its header says")
        return array


def parse_fingerprint(text: str) -> dict[str, Any]:
    """A fingerprint from its member's text. Raises ValueError."""
    fingerprint = json.loads(text)
    if not isinstance(fingerprint, dict):
        raise ValueError("the fingerprint is no table")
    return fingerprint
