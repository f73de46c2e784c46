"""Scenes to pixels. Everything is drawn four times as large and made smaller, so that edges are smooth.

Shapes: H W pixels; masks are float32 (H, W) in 0..1, pictures uint8 (H, W, 3) RGB.
"""

from __future__ import annotations

import math
import random

import cv2
import numpy as np
from numpy.typing import NDArray

from library.rng import stream
from library.scenes.world import ALL_COLOURS, RGB, Figure, Scene

Mask = NDArray[np.float32]
Picture = NDArray[np.uint8]
Points = list[tuple[float, float]]
OVERSIZE = 4
COLOUR_SPREAD = 8  # a colour word means any colour this near to its own, in steps of 255


def _circle(radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> Points:
    angles = [2 * math.pi * step / 72 for step in range(72)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def _star() -> Points:
    corners = [(math.pi * (step / 5 - 0.5), 1.0 if step % 2 == 0 else 0.42) for step in range(10)]
    return [(length * math.cos(angle), length * math.sin(angle) + 0.08) for angle, length in corners]


def _heart() -> Points:
    # the curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, made to fill the box
    points: Points = []
    for step in range(90):
        t = 2 * math.pi * step / 90
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 14.5))
    return points


def _cross(arm: float = 0.32) -> Points:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points: Points = []
    for turn in range(4):
        cos, sin = round(math.cos(turn * math.pi / 2)), round(math.sin(turn * math.pi / 2))
        points += [(x * cos - y * sin, x * sin + y * cos) for x, y in quarter]
    return points


SOLIDS: dict[str, list[Points]] = {
    "circle": [_circle()],
    "square": [[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]],
    "triangle": [[(0, -0.95), (1, 0.85), (-1, 0.85)]],
    "star": [_star()],
    "heart": [_heart()],
    "diamond": [[(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]],
    "cross": [_cross()],
    "ring": [_circle()],
    "house": [[(-0.7, -0.05), (0.7, -0.05), (0.7, 0.95), (-0.7, 0.95)], [(0, -1), (1, 0), (-1, 0)]],
    "arrow": [[(-1, -0.28), (0.1, -0.28), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.28), (-1, 0.28)]],
    "moon": [_circle(centre=(0.22, 0.0))],
    "fish": [
        [(0.45 + 0.65 * (x - 0.3), 0.55 * y) for x, y in _circle()],
        [(-0.1, 0), (-1, -0.65), (-1, 0.65)],
    ],
}
"""Polygons of each shape, in a box from -1 to 1."""
HOLES: dict[str, Points] = {
    "ring": _circle(0.55),
    "moon": _circle(0.85, (0.72, -0.1)),
    "house": [(-0.2, 0.4), (0.2, 0.4), (0.2, 0.95), (-0.2, 0.95)],
}
"""What is cut out of a shape."""


def freehand(seed: int) -> tuple[list[Points], Points | None]:
    """The polygons and the hole of a random outline, in a box from -1 to 1: one to three ellipses and polygons."""
    rng = stream(seed, "outline")
    parts = [_random_part(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    corners = np.concatenate([np.array(part) for part in parts])
    low, high = corners.min(axis=0), corners.max(axis=0)
    middle, half = (low + high) / 2, float((high - low).max()) / 2
    solids = [[((x - middle[0]) / half, (y - middle[1]) / half) for x, y in part] for part in parts]
    hole = _circle(rng.uniform(0.2, 0.4), (rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)))
    return solids, hole if rng.random() < 0.3 else None


def _random_part(rng: random.Random) -> Points:
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)
    width, height = rng.uniform(0.25, 0.8), rng.uniform(0.25, 0.8)
    if rng.random() < 0.35:
        outline = _circle()
    else:
        turns = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.choice((3, 4, 5, 7))))
        outline = [(math.cos(turn), math.sin(turn)) for turn in turns]
    return [(x + width * across, y + height * down) for across, down in outline]


def figure_mask(figure: Figure, side_px: int) -> Mask:
    """Where the figure is: 1 inside, 0 outside, between on the edge."""
    if figure.outline is None:
        return shape_mask(figure.shape, figure.centre, figure.radius, side_px)
    return polygon_mask(*freehand(figure.outline), figure.centre, figure.radius, side_px)


def shape_mask(shape: str, centre: tuple[float, float], radius: float, side_px: int) -> Mask:
    """Where the shape is: 1 inside, 0 outside, between on the edge. ``centre`` and ``radius`` in shares of the side."""
    return polygon_mask(SOLIDS[shape], HOLES.get(shape), centre, radius, side_px)


def polygon_mask(
    solids: list[Points], hole: Points | None, centre: tuple[float, float], radius: float, side_px: int
) -> Mask:
    """The mask of polygons in a box from -1 to 1, put at ``centre`` with half the box's side ``radius``."""
    large = side_px * OVERSIZE
    mask = np.zeros((large, large), np.uint8)

    def pixels(points: Points) -> NDArray[np.int32]:
        return np.round((np.array(points) * radius + np.array(centre)) * large - 0.5).astype(np.int32)

    for points in solids:
        cv2.fillPoly(mask, [pixels(points)], 255)
    if hole:
        cv2.fillPoly(mask, [pixels(hole)], 0)
    return _smaller(mask, side_px)


def _smaller(mask: Picture, side_px: int) -> Mask:
    smaller = cv2.resize(mask, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return np.divide(smaller, 255, dtype=np.float32)


def draw(scene: Scene, rng: random.Random, side_px: int = 64) -> Picture:
    """The scene's picture, a square. ``rng`` draws the shades within a colour's spread."""
    canvas = np.empty((side_px, side_px, 3), np.float32)
    canvas[:] = near(ALL_COLOURS[scene.ground], rng)
    if scene.ground_texture != "plain":
        step = side_px // 4
        rows, columns = np.indices((side_px, side_px))
        odd = (columns // step) % 2 == 1 if scene.ground_texture == "striped" else (rows // step + columns // step) % 2
        canvas[odd.astype(bool)] = mixed(ALL_COLOURS[scene.ground])
    for figure in scene.figures:
        paint(canvas, figure_mask(figure, side_px), figure, rng)
    return canvas.round().clip(0, 255).astype(np.uint8)


def paint(canvas: NDArray[np.float32], mask: Mask, figure: Figure, rng: random.Random) -> None:
    """Lay the figure's colour, texture and style over the canvas (H, W, 3) where the mask is."""
    side_px = canvas.shape[0]
    rows, columns = np.indices((side_px, side_px), dtype=np.float32) / side_px
    colour = np.empty_like(canvas)
    colour[:] = near(ALL_COLOURS[figure.colour], rng)
    unit = figure.radius * 2
    across, down = (columns - figure.centre[0]) / unit, (rows - figure.centre[1]) / unit
    if figure.texture == "striped":
        colour[np.floor((down + 0.5) * 5) % 2 == 1] = mixed(ALL_COLOURS[figure.colour])
    elif figure.texture == "spotted":
        spots = ((across * 3.2) % 1 - 0.5) ** 2 + ((down * 3.2) % 1 - 0.5) ** 2 < 0.09
        colour[spots] = mixed(ALL_COLOURS[figure.colour])
    if figure.style == "shaded":
        light = np.clip(1.25 - 0.9 * (across + down + 0.6), 0.35, 1.25)[..., None]
        colour = np.clip(colour * light + np.clip(light - 1, 0, 1) * 160, 0, 255)
    elif figure.style == "outlined":
        width = max(3, round(side_px * figure.radius * 0.28)) | 1
        inner = cv2.erode(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
        mask = np.asarray(mask - inner, np.float32)
    canvas[:] = canvas * (1 - mask[..., None]) + colour * mask[..., None]


def near(colour: RGB, rng: random.Random) -> NDArray[np.float32]:
    """A shade that the colour's word still means."""
    return np.array([channel + rng.uniform(-COLOUR_SPREAD, COLOUR_SPREAD) for channel in colour], np.float32)


def mixed(colour: RGB) -> NDArray[np.float32]:
    """The second colour of a texture: lighter, or darker for light colours."""
    other = 255.0 if sum(colour) < 384 else 0.0
    return np.array(colour, np.float32) * 0.62 + other * 0.38
