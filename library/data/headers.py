"""The size of an image from its header, and cheap signs of damage. Pixels are decoded only where the signs are bad."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import BinaryIO

from library.data.formats import missing_plug_in, needs_plug_in
from library.data.records import Size

MIN_SIDE_PX = 8
MAX_PIXELS = 200_000_000  # decoding takes three bytes a pixel, and the resizing as much again

_HEAD_BYTES = 4096
_TAIL_BYTES = 64
_PNG_HEAD_BYTES = 65536  # EXIF data of a PNG stand before its pixels, but perhaps behind a colour profile
_WEBP_HAS_EXIF = 0x08  # flag of the extended header
_ROTATING_ORIENTATIONS = range(5, 9)  # EXIF orientations that swap width and height
_EXIF_ORIENTATION = 274
_JPEG, _PNG, _WEBP, _BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of segments that hold the size
_JPEG_EXIF = 0xE1


class BadFile(Exception):
    """A file that cannot be used; the text says why."""


def measure(path: str) -> Size:
    """Width and height of an image in pixels after EXIF orientation.

    Raises BadFile with the reason if the file is empty, cut short, no image, too small or too large.
    """
    missing = missing_plug_in(path)
    if missing is not None:
        raise BadFile(missing)
    try:
        with open(path, "rb", buffering=0) as file:
            size = _size_of(file, by_pillow=needs_plug_in(path))
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror or error})") from error
    width, height = size
    if min(size) < MIN_SIDE_PX:
        raise BadFile(f"{width}x{height} pixels are too few; each side must have at least {MIN_SIDE_PX}")
    if width * height > MAX_PIXELS:
        raise BadFile(f"{width}x{height} pixels are too many to decode (over {MAX_PIXELS:,}); make it smaller")
    return size


@dataclass(frozen=True, slots=True)
class _Ends:
    """The first and last bytes of a file, and its length."""

    head: bytes
    tail: bytes
    length: int


def _size_of(file: io.FileIO, *, by_pillow: bool) -> Size:
    head = file.read(_HEAD_BYTES)
    if not head:
        raise BadFile("the file is empty")
    if by_pillow:  # of a picture made of tiles a reader of headers may find the size of a tile
        return _pillow_size(file, decode=False)
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _TAIL_BYTES))
    ends = _Ends(head, file.read(), length)
    if _looks_cut_short(ends):
        return _pillow_size(file, decode=True)
    size = _quick_size(head)
    if size is not None and not (head.startswith(_PNG) and _png_has_exif(file, head)):
        return size
    if _webp_has_exif(head) or head.startswith(_PNG):
        return _pillow_size(file, decode=False)
    return _header_size(file) or _pillow_size(file, decode=False)


def _quick_size(head: bytes) -> Size | None:
    """The size of a PNG, or of a JPEG without EXIF data, if it stands in the first bytes."""
    if head.startswith(_PNG):
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if not head.startswith(_JPEG):
        return None
    place = 2
    while place + 9 <= len(head) and head[place] == 0xFF:
        marker = head[place + 1]
        if marker in _JPEG_FRAMES:
            return int.from_bytes(head[place + 7 : place + 9], "big"), int.from_bytes(
                head[place + 5 : place + 7], "big"
            )
        if marker == _JPEG_EXIF or marker == 0xFF:  # EXIF: perhaps turned; FF: filling bytes, which are rare
            return None
        place += 2 + int.from_bytes(head[place + 2 : place + 4], "big")
    return None


def _png_has_exif(file: io.FileIO, head: bytes) -> bool:
    if len(head) == _HEAD_BYTES:
        file.seek(0)
        head = file.read(_PNG_HEAD_BYTES)
    return b"eXIf" in head


def _webp_has_exif(head: bytes) -> bool:
    is_extended = head.startswith(_WEBP) and head[12:16] == b"VP8X"
    return is_extended and bool(int.from_bytes(head[20:21], "little") & _WEBP_HAS_EXIF)


def _looks_cut_short(ends: _Ends) -> bool:
    """True if the end of the file is not what its format ends with. Only a hint: some programs append own data."""
    head = ends.head
    if head.startswith(_JPEG):
        return b"\xff\xd9" not in ends.tail
    if head.startswith(_PNG):
        return b"IEND" not in ends.tail
    if head.startswith(_WEBP):
        return ends.length < int.from_bytes(head[4:8], "little") + 8
    if head.startswith(_BMP):
        return ends.length < int.from_bytes(head[2:6], "little")
    return False


def _header_size(file: io.FileIO) -> Size | None:
    """The size from the header, or None if the header reader does not know the format."""
    import imagesize

    file.seek(0)
    try:
        width, height = imagesize.get(file)
    except Exception:  # it raises whatever a damaged header leads it to; Pillow then says what is wrong
        return None
    return (int(width), int(height)) if min(width, height) > 0 else None


def _pillow_size(file: BinaryIO | io.FileIO, *, decode: bool) -> Size:
    """The size as Pillow finds it; with ``decode`` the whole image must be readable, not only its header."""
    from PIL import Image, UnidentifiedImageError

    file.seek(0)
    try:
        with Image.open(io.BytesIO(file.read())) as image:
            size, orientation = image.size, image.getexif().get(_EXIF_ORIENTATION)
            if decode and size[0] * size[1] <= MAX_PIXELS:
                image.load()
    except UnidentifiedImageError as error:
        raise BadFile("is no image of a known format, or needs a Pillow plug-in that is not installed") from error
    except Image.DecompressionBombError as error:
        raise BadFile(f"has too many pixels to decode (over {MAX_PIXELS:,}); make it smaller") from error
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise BadFile(f"is damaged or cut short ({error})") from error
    return (size[1], size[0]) if orientation in _ROTATING_ORIENTATIONS else size
