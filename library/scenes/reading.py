"""What a picture shows, read by plain image analysis: no model judges a model here.

The ground is the commonest colour of the border. What differs from it falls into connected figures; each gives a
colour (median), a place and a size (its box) and a shape (the template of that box with the best overlap).

Shapes: H W pixels, pictures uint8 (H, W, 3) RGB.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from library.scenes.drawing import Mask, Picture, shape_mask
from library.scenes.world import ALL_COLOURS, ALL_SHAPES, PLACES, RGB, Place, Size

DIFFERENT = 70.0  # distance of two colours in steps of 255: less is a shade of the same
EVEN_SHARE = 0.6  # of a figure's pixels must be near its median colour, else it has no colour
KNOWN_OVERLAP = 0.6  # with less the figure is none of the shapes
MIXED, UNKNOWN = "mixed", "unknown"
SMALLEST_SHARE = 0.006  # of the picture's area: less is a speck
TEMPLATE_PX, CANVAS_PX, SHIFT_PX = 48, 80, 4
FACTORS = (1.0, 1.1, 1.2)
SMALL_BELOW, MEDIUM_BELOW = 0.23, 0.35
"""Largest radius (half the longer side of the box, share of the picture's side) of these sizes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One figure of a picture. ``overlap`` is intersection over union with the best shape's template."""

    shape: str
    colour: str
    place: Place
    size: Size
    overlap: float
    area: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows: the ground's colour and the figures, largest first."""

    ground: str
    figures: tuple[Seen, ...]


def read(picture: Picture, shapes: tuple[str, ...] = ALL_SHAPES) -> Reading:
    """Read a square picture of flat figures on a plain ground; ``shapes`` are the candidates."""
    side = picture.shape[0]
    ground = _ground(picture)
    far = np.linalg.norm(picture.astype(np.float32) - ground, axis=-1) > DIFFERENT
    count, labels, stats, _ = cv2.connectedComponentsWithStats(far.astype(np.uint8), connectivity=8)
    seen: list[Seen] = []
    for label in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[label])
        if area < SMALLEST_SHARE * side * side:
            continue
        inside = labels == label
        shape, overlap = best_shape(inside[top : top + height, left : left + width], shapes)
        core = cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        pixels = picture[core if core.sum() >= 4 else inside]
        radius = max(width, height) / 2 / side
        x, y = (left + width / 2) / side, (top + height / 2) / side
        colour = flat_colour(pixels.astype(np.float32))
        seen.append(Seen(shape, colour, place_name(x, y), size_name(radius), overlap, area / side / side))
    return Reading(colour_name(ground), tuple(sorted(seen, key=lambda figure: -figure.area)))


def _ground(picture: Picture) -> NDArray[np.float32]:
    """Median colour of the border, of those border pixels that have the commonest colour word."""
    border = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3)])
    border = np.concatenate([border, picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)]).astype(np.float32)
    words = _nearest(border)
    commonest = np.bincount(words).argmax()
    return np.median(border[words == commonest], axis=0).astype(np.float32)


def _nearest(pixels: NDArray[np.float32]) -> NDArray[np.intp]:
    named = np.array(list(ALL_COLOURS.values()), np.float32)
    return np.linalg.norm(pixels[:, None] - named[None], axis=-1).argmin(axis=1)


def colour_name(colour: NDArray[np.floating] | RGB) -> str:
    """The word of the nearest colour."""
    return tuple(ALL_COLOURS)[int(_nearest(np.asarray(colour, np.float32)[None])[0])]


def flat_colour(pixels: NDArray[np.float32]) -> str:
    """The word of the median of pixels (N, 3), or MIXED if too many are far from it."""
    median = np.median(pixels, axis=0)
    near = np.linalg.norm(pixels - median, axis=-1) < DIFFERENT
    return colour_name(median) if near.mean() >= EVEN_SHARE else MIXED


def place_name(x: float, y: float) -> Place:
    """The word of the nearest place."""
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)


def size_name(radius: float) -> Size:
    """The word of a size; ``radius`` is half the longer side of the box, as a share of the picture's side."""
    return "small" if radius < SMALL_BELOW else "medium" if radius < MEDIUM_BELOW else "big"


def best_shape(inside: NDArray[np.bool_], shapes: tuple[str, ...]) -> tuple[str, float]:
    """The shape whose template overlaps best with a mask cut to its box (or UNKNOWN), and the overlap (0..1).

    Templates are also tried larger than the box and a little beside it: soft pictures lose the tips of stars first,
    and with them the box.
    """
    scale = TEMPLATE_PX / max(inside.shape)
    height, width = (max(1, round(length * scale)) for length in inside.shape)
    grown = cv2.resize(inside.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    canvas = np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
    top, left = (CANVAS_PX - height) // 2, (CANVAS_PX - width) // 2
    canvas[top : top + height, left : left + width] = grown
    overlaps = {shape: max(overlap(canvas, template(shape, factor)) for factor in FACTORS) for shape in shapes}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= KNOWN_OVERLAP else UNKNOWN, overlaps[best]


@cache
def template(shape: str, factor: float) -> NDArray[np.float32]:
    """The shape's mask (1 inside), cut to its box; the longer side is ``factor`` times TEMPLATE_PX."""
    mask: Mask = shape_mask(shape, (0.5, 0.5), 0.45, 4 * TEMPLATE_PX)
    rows, columns = np.nonzero(mask > 0.5)
    cut = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = factor * TEMPLATE_PX / max(cut.shape)
    height, width = (max(1, round(length * scale)) for length in cut.shape)
    return (cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA) > 0.5).astype(np.float32)


def overlap(canvas: NDArray[np.float32], mask: NDArray[np.float32]) -> float:
    """Largest intersection over union of a figure in the middle of a canvas and a mask, shifted up to SHIFT_PX."""
    top, left = ((CANVAS_PX - length) // 2 - SHIFT_PX for length in mask.shape)
    height, width = (length + 2 * SHIFT_PX for length in mask.shape)
    near = canvas[top : top + height, left : left + width]
    common = float(cv2.matchTemplate(near, mask, cv2.TM_CCORR).max())
    return common / (float(canvas.sum() + mask.sum()) - common)
