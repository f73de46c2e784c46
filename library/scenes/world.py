"""What a scene is made of, as plain data: words, colours, sizes, places. Lengths are shares of the picture's side."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

RGB = tuple[int, int, int]
Style = Literal["flat", "outlined", "shaded"]
Texture = Literal["plain", "striped", "spotted"]
GroundTexture = Literal["plain", "striped", "checkered"]
Size = Literal["small", "medium", "big"]
Place = Literal["centre", "left", "right", "top", "bottom"]

COLOURS: dict[str, RGB] = {
    "red": (215, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (45, 160, 65),
    "blue": (40, 85, 215),
    "purple": (125, 45, 165),
    "pink": (250, 150, 195),
    "brown": (125, 75, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
NEW_COLOURS: dict[str, RGB] = {"turquoise": (40, 200, 190), "grey": (130, 130, 130)}
"""Colours that the built-in model never sees: words to teach it."""
ALL_COLOURS = COLOURS | NEW_COLOURS
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
"""The shapes that the built-in model learns."""
NEW_SHAPES = ("house", "arrow", "moon", "fish")
"""Shapes that it never sees: subjects to teach it."""
ALL_SHAPES = (*SHAPES, *NEW_SHAPES)
FREEHAND = "shape"
"""The word for figures that have no name of their own: with them the model learns to draw any outline anywhere."""
STYLES: tuple[Style, ...] = ("flat", "outlined", "shaded")
TEXTURES: tuple[Texture, ...] = ("plain", "striped", "spotted")
GROUND_TEXTURES: tuple[GroundTexture, ...] = ("plain", "striped", "checkered")
PLACES: dict[Place, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "left": (0.32, 0.5),
    "right": (0.68, 0.5),
    "top": (0.5, 0.32),
    "bottom": (0.5, 0.68),
}
RADII: dict[Size, tuple[float, float]] = {"small": (0.17, 0.2), "medium": (0.26, 0.3), "big": (0.4, 0.45)}
"""Half the side of the box around a shape, smallest and largest."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape in a scene. ``centre`` is x, y from the upper left corner, ``radius`` half the side of its box.

    ``outline`` is the seed of a freehand figure's outline.
    """

    shape: str
    colour: str
    size: Size = "medium"
    place: Place = "centre"
    style: Style = "flat"
    texture: Texture = "plain"
    centre: tuple[float, float] = (0.5, 0.5)
    radius: float = 0.24
    outline: int | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """Figures on a ground. Several figures of one kind are a count; two of different kinds stand side by side."""

    figures: tuple[Figure, ...]
    ground: str
    ground_texture: GroundTexture = "plain"


def is_held_out(shape: str, colour: str, ground: str) -> bool:
    """True for the combinations (one in ten) that no training scene shows as its figure and ground.

    They are spread so that every word stays in use: along a diagonal of the table of all combinations.
    """
    shapes, colours = ALL_SHAPES, tuple(ALL_COLOURS)
    return (shapes.index(shape) + 3 * colours.index(colour) + colours.index(ground)) % 10 == 0


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """All (shape, colour, ground) of the world with a ground of another colour, held out or not."""
    return [
        (shape, colour, ground)
        for shape, colour, ground in product(SHAPES, COLOURS, COLOURS)
        if colour != ground and is_held_out(shape, colour, ground) == held_out
    ]
