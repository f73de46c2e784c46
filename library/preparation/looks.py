"""What is learnt of an image by decoding it once: whether it can be, what it looks like, transparency."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import cv2
import numpy as np

from library.data.images import Pixels, UnreadableImage, alpha_of, opaque, read_pixels

_HASH_SIDE, _DCT_SIDE = 8, 32
_FLAT = 2.0  # deviation of the brightness, 0..255, below which a hash would tell noise only


@dataclass(frozen=True, slots=True)
class Look:
    """One image. ``digest``: of the decoded pixels, so it is the same for copies of any format without loss.

    ``hash``: 64 bits of `perceptual_hash`; None for pictures of one colour. ``problem``: why it cannot be decoded.
    """

    path: str
    size_bytes: int = 0
    digest: bytes = b""
    hash: int | None = None
    is_transparent: bool = False
    problem: str | None = None


def look_at(path: str) -> Look:
    """Decode an image. Never raises for a bad file."""
    try:
        size_bytes = os.path.getsize(path)
        pixels_HWC = read_pixels(path)
    except UnreadableImage as error:
        return Look(path, problem=error.reason)
    except OSError as error:
        return Look(path, problem=f"cannot be read ({error.strerror or error})")
    alpha_HW, pixels_HWC = alpha_of(pixels_HWC), opaque(pixels_HWC)
    transparent = alpha_HW is not None and bool(alpha_HW.min() < 255)
    digest = hashlib.blake2b(pixels_HWC.tobytes(), digest_size=16, salt=repr(pixels_HWC.shape).encode()[:16]).digest()
    return Look(path, size_bytes, digest, perceptual_hash(pixels_HWC), transparent)


def perceptual_hash(pixels_HWC: Pixels) -> int | None:
    """64 bits that stay nearly the same when a picture is scaled, recompressed or slightly changed in colour.

    The DCT hash of C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), 3.2.1: the
    brightness at 32 x 32, its cosine transform, of that the 8 x 8 lowest frequencies without the first row and
    column; a bit says whether one is above their median. Equal in b bits of 64 by chance: Hamming distance about 32.
    """
    gray = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY)
    small = np.asarray(cv2.resize(gray, (_DCT_SIDE, _DCT_SIDE), interpolation=cv2.INTER_AREA), np.float32)
    if float(small.std()) < _FLAT:
        return None
    low = np.asarray(cv2.dct(small))[1 : _HASH_SIDE + 1, 1 : _HASH_SIDE + 1].ravel()
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")
