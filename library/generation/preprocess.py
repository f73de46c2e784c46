"""What may be done to a guide picture before a ControlNet sees it: light work that needs OpenCV only.

A name may carry numbers: ``canny_50_150``. Pictures are uint8 RGB arrays (height, width, 3), in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from library.data.images import Pixels
from library.log import UserError

Preprocessor = Callable[[Pixels], Pixels]
CANNY_LOW, CANNY_HIGH = 63, 191
_FINE_SIGMA, _COARSE_SIGMA = 1.0, 1.6  # pixels; their ratio makes the difference nearly a Laplacian
_LINE_GAIN = 12.0
_SCRIBBLE_LEVEL = 60
_SCRIBBLE_WIDTH = 5


def canny(pixels_HW3: Pixels, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> Pixels:
    """White edges on black, three equal channels (J. Canny, 1986). ``low``, ``high``: thresholds of the gradient."""
    return _three(_uint8(cv2.Canny(_gray(pixels_HW3), low, high)))


def invert(pixels_HW3: Pixels) -> Pixels:
    """The negative: for drawings with black lines, where nets want white ones."""
    return 255 - pixels_HW3


def gray(pixels_HW3: Pixels) -> Pixels:
    """Brightness alone: for nets that bring colours."""
    return _three(_gray(pixels_HW3))


def blur(pixels_HW3: Pixels, sigma: float = 8) -> Pixels:
    """Gaussian blur of ``sigma`` pixels."""
    return _uint8(cv2.GaussianBlur(pixels_HW3, (0, 0), sigma))


def tile(pixels_HW3: Pixels, factor: float = 8) -> Pixels:
    """Detail taken away: ``factor`` times smaller and back to the size. For nets that invent detail."""
    height, width = pixels_HW3.shape[:2]
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    return _uint8(cv2.resize(cv2.resize(pixels_HW3, small, interpolation=cv2.INTER_AREA), (width, height)))


def threshold(pixels_HW3: Pixels, level: float = 127) -> Pixels:
    """White where the brightness is above ``level``, else black."""
    return _three(_uint8((_gray(pixels_HW3) > level) * np.uint8(255)))


def lineart(pixels_HW3: Pixels) -> Pixels:
    """White lines on black where the picture is darker than its surroundings: difference of two Gaussian blurs."""
    brightness = _gray(pixels_HW3).astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(brightness, (0, 0), sigma) for sigma in (_FINE_SIGMA, _COARSE_SIGMA))
    return _three(_uint8(np.clip((coarse - fine) * _LINE_GAIN, 0, 255)))


def scribble(pixels_HW3: Pixels) -> Pixels:
    """Thick white strokes on black: the strong ones of `lineart`."""
    strong = _uint8((lineart(pixels_HW3)[:, :, 0] > _SCRIBBLE_LEVEL) * np.uint8(255))
    return _three(_uint8(cv2.dilate(strong, np.ones((_SCRIBBLE_WIDTH, _SCRIBBLE_WIDTH), np.uint8))))


def unchanged(pixels_HW3: Pixels) -> Pixels:
    """The picture as it is."""
    return pixels_HW3


@dataclass(frozen=True)
class _Kind:
    """``numbers``: how many a name may carry; ``lowest``: what each must at least be."""

    work: Callable[..., Pixels]
    numbers: int = 0
    lowest: float = 0


_KINDS = {
    "none": _Kind(unchanged),
    "canny": _Kind(canny, 2),
    "lineart": _Kind(lineart),
    "scribble": _Kind(scribble),
    "invert": _Kind(invert),
    "gray": _Kind(gray),
    "grey": _Kind(gray),
    "recolor": _Kind(gray),
    "blur": _Kind(blur, 1, 0.1),
    "tile": _Kind(tile, 1, 1),
    "threshold": _Kind(threshold, 1),
}
PREPROCESSORS: Sequence[str] = tuple(_KINDS)


def make_preprocessor(text: str) -> Preprocessor:
    """The work that a name stands for: ``canny``, ``canny_LOW_HIGH``, ``blur_SIGMA``, ``tile_FACTOR``,
    ``threshold_LEVEL`` and the other names alone. Raises UserError for anything else.
    """
    name, *given = text.strip().lower().split("_")
    kind = _KINDS.get(name)
    if kind is None:
        known = ", ".join(PREPROCESSORS)
        raise UserError(f"--control_net_preps {text}: there is no such preprocessor; choose one of {known}")
    if len(given) > kind.numbers:
        raise UserError(f"--control_net_preps {text}: {name} takes {kind.numbers or 'no'} numbers, not {len(given)}")
    try:
        numbers = [float(number) for number in given]
    except ValueError:
        raise UserError(f"--control_net_preps {text}: {'_'.join(given)} must be numbers") from None
    if any(not kind.lowest <= number < np.inf for number in numbers):
        raise UserError(f"--control_net_preps {text}: the numbers must be at least {kind.lowest:g}")
    return lambda pixels_HW3: kind.work(pixels_HW3, *numbers)


def _gray(pixels_HW3: Pixels) -> Pixels:
    return _uint8(cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2GRAY))


def _three(pixels_HW: Pixels) -> Pixels:
    return np.repeat(pixels_HW[:, :, None], 3, axis=2)


def _uint8(pixels: object) -> Pixels:
    return np.asarray(pixels).astype(np.uint8)
