"""Given pictures and masks: read, and brought to the size that is drawn by scaling and cutting, never by distortion.

Shapes: H W pixel height and width; sizes are (width, height). Masks are grey: 255 is drawn anew, 0 is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.log import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SHAPE_TOLERANCE = 0.02  # a mask's proportions may differ from its picture's by this much, from rounding
FEATHER_PIXELS = 4
MOST_CUT_PIXELS = 32  # what rounding down to a multiple can leave over: it is cut off, the other pixels stay


def size_of_picture(path: str) -> tuple[int, int]:
    """(width, height), turned as EXIF says, from the file's head. Raises UserError."""
    from PIL import Image as PilImage
    from PIL import UnidentifiedImageError

    try:
        with PilImage.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error


def drawn_size(picture: tuple[int, int], width: int | None, height: int | None, step: int) -> tuple[int, int]:
    """The size at which a picture is drawn: what is asked for; a side that is not follows from the proportions.

    Sides are rounded down to multiples of ``step``, but not to 0.
    """
    if width is None and height is None:
        width, height = picture
    elif width is None:
        width = round((height or 0) * picture[0] / picture[1])
    elif height is None:
        height = round(width * picture[1] / picture[0])
    return max(step, width // step * step), max(step, (height or 0) // step * step)


def read_picture(path: str) -> Image:
    """A picture in RGB, transparency laid over white. Raises UserError."""
    from PIL import Image as PilImage

    from library.data.images import UnreadableImage, read_image

    try:
        return PilImage.fromarray(read_image(path))
    except (UnreadableImage, OSError) as error:
        raise UserError(f"{error}; choose another picture") from error


def fit(picture: Image, size: tuple[int, int]) -> Image:
    """The picture scaled until it covers ``size``, its middle cut out; not scaled if it is hardly larger.

    Colours are scaled by Lanczos. Grey masks are averaged, so that no edge reaches beyond the pixels under it.
    """
    from PIL import Image as PilImage

    over = (picture.width - size[0], picture.height - size[1])
    if min(over) >= 0 and max(over) < MOST_CUT_PIXELS:
        left, top = over[0] // 2, over[1] // 2
        return picture.crop((left, top, left + size[0], top + size[1]))
    factor = max(size[0] / picture.width, size[1] / picture.height)
    # rounding may make a side a hair longer than the picture, which is refused
    width, height = min(size[0] / factor, picture.width), min(size[1] / factor, picture.height)
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    filter_ = PilImage.Resampling.BOX if picture.mode == "L" else PilImage.Resampling.LANCZOS
    return picture.resize(size, filter_, box=(left, top, picture.width - left, picture.height - top))


def resized(picture: Image, size: tuple[int, int]) -> Image:
    """The whole picture at another size, by Lanczos; itself if it has that size."""
    from PIL import Image as PilImage

    return picture if picture.size == size else picture.resize(size, PilImage.Resampling.LANCZOS)


def read_mask(path: str, source_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """How much of each pixel (1, H, W) is drawn anew, 0..1. It is cut like its picture, whose size is ``source_size``.

    Raises UserError if the mask has other proportions than the picture.
    """
    from PIL import Image as PilImage

    mask = read_picture(path).convert("L")
    shape, wanted = mask.width / mask.height, source_size[0] / source_size[1]
    if abs(shape / wanted - 1) > SHAPE_TOLERANCE:
        raise UserError(
            f"--mask_path {path}: {mask.width}x{mask.height} pixels do not fit the picture's "
            f"{source_size[0]}x{source_size[1]}; the mask must have the proportions of its picture"
        )
    if mask.size != source_size:
        mask = mask.resize(source_size, PilImage.Resampling.BOX)
    return to_tensor([fit(mask, size)])[0] / 2 + 0.5


def to_tensor(pictures: Sequence[Image]) -> Tensor:
    """(B, 3, H, W) in -1..1 of pictures in RGB, (B, 1, H, W) of grey ones."""
    import numpy as np

    stacked = torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))
    pixels_BHWC = stacked if stacked.ndim == 4 else stacked[..., None]
    return pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_picture(images_BCHW: Tensor) -> Image:
    """The first image of a batch (B, 3, H, W) in -1..1 as an 8-bit picture."""
    from PIL import Image as PilImage

    pixels_HWC = ((images_BCHW[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return PilImage.fromarray(pixels_HWC.numpy())


def feathered(mask_1HW: Tensor) -> Tensor:
    """The mask with a ramp of a few pixels along its edge, all on the side that is drawn: what is 0 stays 0."""
    import cv2

    drawn_HW = (mask_1HW[0] > 0).byte().numpy()
    if drawn_HW.all():
        return mask_1HW
    distance_HW = torch.from_numpy(cv2.distanceTransform(drawn_HW, cv2.DIST_L2, 5))
    return mask_1HW * (distance_HW / FEATHER_PIXELS).clamp(max=1)
