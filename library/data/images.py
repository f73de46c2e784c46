"""Pixels of one image: decode, resize, crop, augment, to a tensor.

Pictures are uint8 arrays HWC in RGB (H, W pixel height and width, C = 3). Sizes are ``(width, height)``. No files
are found here and no bucket is chosen: see `index` and `buckets`. Every random draw comes from the sample's own
seed.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from library.data.face_names import FaceBox
from library.data.formats import missing_plug_in
from library.data.records import Augmentation, Fit, Size
from library.rng import stream

if TYPE_CHECKING:
    import random

Pixels = NDArray[np.uint8]

RESIZE_VERSION = 1  # part of the latent caches' fingerprint: raise it when the same file would give other pixels
_COLOR_CHANCE = 0.33
_HUE_REACH = 8.0  # on OpenCV's scale of 0..179
_GAMMA_RANGE = (0.95, 1.05)
_PNG = b"\x89PNG\r\n\x1a\n"
_FILLING = 128  # the brightness and colours of what a JPEG decoder has no data for
_MORE_JPEG_DATA = bytes.fromhex("5a93c6e17b2d") * 8  # any bytes that are no marker and have few zeros
_ASK_PIL = (b"eXIf", b"EXIF")  # PNG and WebP with an orientation: OpenCV ignores it whenever it keeps the alpha channel


class UnreadableImage(Exception):
    """A picture file that cannot be used. ``path`` names it, ``reason`` says why in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Cut:
    """What was done to an image's geometry: resized, mirrored if ``flipped``, cut at ``left_top`` (of the mirror image
    if ``flipped``).
    """

    resized: Size
    left_top: tuple[int, int]
    bucket: Size
    flipped: bool = False

    def mirrored(self) -> Cut:
        """The same part of the picture, taken from its mirror image."""
        left, top = self.left_top
        return replace(self, left_top=(self.resized[0] - self.bucket[0] - left, top), flipped=not self.flipped)


@dataclass(frozen=True, slots=True)
class FittedPixels:
    """A picture that fills its bucket, and what was really done to it."""

    pixels_HWC: Pixels
    cut: Cut


def read_image(path: str) -> Pixels:
    """Decode a file to RGB, turned as its EXIF orientation says, alpha laid over white, 16 bit reduced to 8.

    Raises `UnreadableImage` naming the file if it is missing, truncated or no picture.
    """
    return opaque(read_pixels(path))


def read_pixels(path: str) -> Pixels:
    """As `read_image`, but with the alpha as a fourth channel if the file has one (0 transparent, 255 opaque)."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(path, f"cannot be read ({error.strerror or error})") from error
    if not data:
        raise UnreadableImage(path, "the file is empty")
    pixels = _decode_opencv(data) if _suits_opencv(data) else None
    if pixels is None:
        return _decode_pil(path, data)
    if data[:2] == b"\xff\xd8" and _runs_dry(data, pixels):
        raise UnreadableImage(path, "its image data end too early: a part of the picture is grey")
    return pixels


def _runs_dry(data: bytes, pixels_HWC: Pixels) -> bool:
    """True for a JPEG whose data end before its picture although the end marker stands there.

    Decoders fill the rest with grey and say nothing that a program could see. So of a picture with a grey corner (which
    one, depends on its orientation) it is tried whether more data before the end marker would be made into pixels.
    Progressive files that lack later passes are whole pictures with less detail: these are not noticed.
    """
    corners = pixels_HWC[(0, 0, -1, -1), (0, -1, 0, -1)]
    if not (corners == _FILLING).all(axis=-1).any():
        return False
    end = data.rfind(b"\xff\xd9")
    longer = _decode_opencv(data[:end] + _MORE_JPEG_DATA + data[end:])
    return longer is None or not np.array_equal(longer, pixels_HWC)


def _suits_opencv(data: bytes) -> bool:
    """True for whole JPEG, PNG and WebP files.

    OpenCV is faster, but some versions return a half-grey picture for a truncated file, so the end of the file is
    looked at first. Marker bytes cannot occur inside JPEG image data, and thumbnails end before the last
    start-of-scan.
    """
    if data[:3] == b"\xff\xd8\xff":
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if any(mark in data for mark in _ASK_PIL):
        return False
    if data[:8] == _PNG:
        return b"IEND" in data[-64:]
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return False


def _decode_opencv(data: bytes) -> Pixels | None:
    jpeg = data[:2] == b"\xff\xd8"
    try:
        # IMREAD_COLOR turns a JPEG as EXIF says; IMREAD_UNCHANGED keeps alpha and 16 bit
        raw = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR if jpeg else cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if raw is None:
        return None
    pixels: NDArray[np.generic] = raw if raw.ndim == 3 else raw[:, :, None]
    channels = pixels.shape[2]
    if channels == 1:
        key = _transparent_grey(data)
        most = 65535 if pixels.dtype == np.uint16 else 255
        alpha = [] if key is None else [np.where(pixels == key, 0, most).astype(pixels.dtype)]
        pixels = np.concatenate([pixels, pixels, pixels, *alpha], axis=2)
    elif channels == 3:
        pixels = pixels[:, :, ::-1]
    elif channels == 4:
        pixels = pixels[:, :, [2, 1, 0, 3]]
    else:
        return None
    return _to_8_bit(pixels)


def _transparent_grey(data: bytes) -> int | None:
    """The one grey, as OpenCV decodes it, that is transparent in a PNG of greys (W3C PNG, 11.3.2.1); OpenCV keeps
    such a mark of coloured PNGs only.
    """
    place = data.find(b"tRNS", 0, max(0, data.find(b"IDAT"))) if data[:8] == _PNG and data[25] == 0 else -1
    if place < 0:
        return None
    depth, grey = data[24], int.from_bytes(data[place + 4 : place + 6], "big")
    return grey if depth == 16 else grey * 255 // (2**depth - 1)


def _decode_pil(path: str, data: bytes) -> Pixels:
    missing = missing_plug_in(path)
    if missing is not None:
        raise UnreadableImage(path, missing)
    try:
        if data[:8] == _PNG:  # its decoder passes over wrong checksums
            Image.open(io.BytesIO(data)).verify()
        with Image.open(io.BytesIO(data)) as opened:
            picture = ImageOps.exif_transpose(opened)
            return _from_pil(picture)
    except Image.DecompressionBombError as error:
        raise UnreadableImage(path, "it has too many pixels to be decoded safely") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, IndexError) as error:
        reason = str(error).split("<_io")[0].strip() or type(error).__name__
        raise UnreadableImage(path, f"it is damaged or of an unknown format ({reason})") from error


def _from_pil(picture: Image.Image) -> Pixels:
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        grey = np.asarray(picture)
        grey = np.clip(grey, 0, 65535).astype(np.uint16) if picture.mode != "F" else np.clip(grey, 0, 255)
        return np.ascontiguousarray(np.repeat(_to_8_bit(grey[:, :, None]), 3, axis=2))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return np.asarray(picture.convert("RGBA"))
    return np.ascontiguousarray(np.asarray(picture.convert("RGB")))


def _to_8_bit(pixels: NDArray[np.generic]) -> Pixels:
    if pixels.dtype == np.uint8:
        return pixels.view(np.uint8)
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.clip(np.rint(pixels.astype(np.float32)), 0, 255).astype(np.uint8)


def alpha_of(pixels_HWC: Pixels) -> Pixels | None:
    """The alpha of RGBA pixels, HW; None of RGB pixels."""
    return np.ascontiguousarray(pixels_HWC[:, :, 3]) if pixels_HWC.shape[2] == 4 else None


def opaque(pixels: Pixels) -> Pixels:
    """RGB of RGB or RGBA pixels; what is transparent becomes white."""
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    color = pixels[:, :, :3].astype(np.uint16)
    alpha = pixels[:, :, 3:].astype(np.uint16)
    return np.ascontiguousarray((color * alpha + 255 * (255 - alpha) + 127) // 255, dtype=np.uint8)


def resize(image_HWC: Pixels, size: Size) -> Pixels:
    """Resize to ``(width, height)``: area averaging when shrinking, cubic when enlarging."""
    height, width = image_HWC.shape[:2]
    if (width, height) == size:
        return image_HWC
    shrinking = size[0] * size[1] <= width * height
    resized = cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    return np.asarray(resized, dtype=np.uint8)


def centred_cut(fit: Fit) -> Cut:
    """The cut of the bucket from the middle of the resized picture."""
    left_top = (fit.resized[0] - fit.bucket[0]) // 2, (fit.resized[1] - fit.bucket[1]) // 2
    return Cut(fit.resized, left_top, fit.bucket)


def is_mirrored(augmentation: Augmentation, sample_seed: int) -> bool:
    """True if a visit shows the mirror image: with probability 0.5, from pixels and from cached latents alike."""
    return augmentation.flip_aug and stream(sample_seed, "flip").random() < 0.5


def fit_pixels(
    image_HWC: Pixels,
    fit: Fit,
    augmentation: Augmentation | None = None,
    sample_seed: int | None = None,
    face: FaceBox | None = None,
) -> FittedPixels:
    """Resize and crop a picture to its bucket and augment it.

    Without ``augmentation`` or ``sample_seed``: centred cut and nothing random. With both: face crop if the range
    is set and ``face`` is known, else a random or centred cut; then colour change; then mirrored or not.
    """
    original: Size = (image_HWC.shape[1], image_HWC.shape[0])
    if augmentation is None or sample_seed is None:
        augmentation, sample_seed = Augmentation(), 0
    draws = stream(sample_seed, "crop")
    if augmentation.face_crop_aug_range is not None and face is not None and original != fit.bucket:
        cut = _face_cut(original, fit.bucket, face, augmentation, draws)
    elif augmentation.random_crop:
        cut = _random_cut(fit, draws)
    else:
        cut = centred_cut(fit)
    pixels_HWC = fit_alike(image_HWC, cut)
    if augmentation.color_aug:
        pixels_HWC = _change_color(pixels_HWC, stream(sample_seed, "color"))
    if is_mirrored(augmentation, sample_seed):
        pixels_HWC, cut = np.ascontiguousarray(pixels_HWC[:, ::-1]), cut.mirrored()
    return FittedPixels(pixels_HWC, cut)


def fit_alike(picture: Pixels, cut: Cut) -> Pixels:
    """Do to a picture (HWC, or HW) what was done to an image, whatever its own size; no colours change."""
    pixels = resize(picture, cut.resized)
    if cut.flipped:
        pixels = pixels[:, ::-1]
    (left, top), (width, height) = cut.left_top, cut.bucket
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def to_model_range(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """uint8 pixels BHWC to float32 BCHW in -1..1, on the same device."""
    return pixels_BHWC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _random_cut(fit: Fit, draws: random.Random) -> Cut:
    left = draws.randint(0, fit.resized[0] - fit.bucket[0])
    top = draws.randint(0, fit.resized[1] - fit.bucket[1])
    return Cut(fit.resized, (left, top), fit.bucket)


def _face_cut(original: Size, target: Size, face: FaceBox, rules: Augmentation, draws: random.Random) -> Cut:
    """Scale so that the face takes 1/high .. 1/low of the shorter target side, then cut around it.

    Enlarges only as far as the target needs to be covered.
    """
    low, high = rules.face_crop_aug_range or (1.0, 1.0)
    face_size, side = max(face.size), min(target)
    cover = max(target[0] / original[0], target[1] / original[1])
    smallest = max(cover, min(1.0, side / (face_size * high)))
    largest = max(smallest, min(1.0, side / (face_size * low)))
    scale = draws.uniform(smallest, largest)
    resized = (
        max(target[0], math.floor(original[0] * scale + 0.5)),
        max(target[1], math.floor(original[1] * scale + 0.5)),
    )
    jitter = 0
    if not rules.random_crop and low != high and face_size > side // 10 and face_size >= 40:
        jitter = face_size
    starts: list[int] = []
    for axis in (0, 1):
        length, center = resized[axis], math.floor(face.center[axis] * scale + 0.5)
        start = center - target[axis] // 2
        if rules.random_crop:
            reach = max(length - center, center)
            start += draws.randint(0, reach) + draws.randint(0, reach) - reach
        elif jitter:
            start += draws.randint(-math.ceil(jitter / 20), jitter // 20)
        starts.append(min(max(start, 0), length - target[axis]))
    return Cut(resized, (starts[0], starts[1]), target)


def _change_color(pixels_HWC: Pixels, draws: random.Random) -> Pixels:
    """With probability 0.33 a small shift of hue, or a gamma on intensities of 0..1 (half of the cases each)."""
    if draws.random() >= _COLOR_CHANCE:
        return pixels_HWC
    if draws.random() < 0.5:
        shift = draws.uniform(-_HUE_REACH, _HUE_REACH)
        hsv = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = np.mod(np.rint(hsv[:, :, 0].astype(np.float32) + shift), 180).astype(np.uint8)
        return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)
    gamma = draws.uniform(*_GAMMA_RANGE)
    table = np.rint(255.0 * (np.arange(256) / 255.0) ** gamma).astype(np.uint8)
    return table[pixels_HWC]
