"""Random scenes: what the built-in model learns from."""

from __future__ import annotations

import random
from dataclasses import replace

from library.scenes.drawing import draw
from library.scenes.reading import read
from library.scenes.world import (
    COLOURS,
    FREEHAND,
    GROUND_TEXTURES,
    PLACES,
    RADII,
    SHAPES,
    STYLES,
    TEXTURES,
    Figure,
    Place,
    Scene,
    Size,
    is_held_out,
)

PLAIN_SHARE = 0.8  # scenes of flat, plain figures
PAIR_SHARE = 0.08  # two figures of different kinds
COUNT_SHARE = 0.12  # two or three figures of one kind
FREEHAND_SHARE = 0.35  # of the scenes of one figure: a figure without a name
SIZE_SHARES: dict[Size, float] = {"small": 0.15, "medium": 0.65, "big": 0.2}
SMALLEST_OUTLINE, MOST_ALIKE = 0.2, 0.8  # share of the picture; intersection over union with a shape that has a name
OFF = 0.05  # how far from its place a figure is, as hands draw; share of the picture's side
COUNT_PLACES = {2: ((0.26, 0.5), (0.74, 0.5)), 3: ((0.25, 0.28), (0.75, 0.28), (0.5, 0.74))}


def random_scene(rng: random.Random) -> Scene:
    """A scene of the training world; held-out combinations of shape, colour and ground never come."""
    figure, ground = random_kind(rng, SHAPES)
    if rng.random() > PLAIN_SHARE:
        figure = replace(figure, style=rng.choice(STYLES), texture=rng.choice(TEXTURES))
    texture = "plain" if rng.random() < 0.92 else rng.choice(GROUND_TEXTURES)
    kind = rng.random()
    if kind < PAIR_SHARE:
        other, _ = random_kind(rng, tuple(shape for shape in SHAPES if shape != figure.shape), ground)
        return Scene(_spread(rng, (figure, other)), ground, texture)
    if kind < PAIR_SHARE + COUNT_SHARE:
        return Scene(_spread(rng, (figure,) * rng.choice((2, 3))), ground, texture)
    if rng.random() < FREEHAND_SHARE:
        figure = replace(figure, shape=FREEHAND, outline=_outline(rng))
    return Scene((_placed(rng, figure),), ground, texture)


def random_kind(rng: random.Random, shapes: tuple[str, ...], ground: str | None = None) -> tuple[Figure, str]:
    """A figure without a place and the colour of its ground, from the combinations that are not held out."""
    while True:
        shape, colour = rng.choice(shapes), rng.choice(tuple(COLOURS))
        behind = ground or rng.choice(tuple(COLOURS))
        if colour != behind and not is_held_out(shape, colour, behind):
            return Figure(shape, colour), behind


def _outline(rng: random.Random) -> int:
    """The seed of an outline in one piece, neither thin nor like a shape that has a name."""
    while True:
        outline = rng.getrandbits(32)
        scene = Scene((Figure(FREEHAND, "black", radius=0.45, outline=outline),), "white")
        seen = read(draw(scene, rng)).figures
        if len(seen) == 1 and seen[0].area > SMALLEST_OUTLINE and seen[0].overlap < MOST_ALIKE:
            return outline


def placed(figure: Figure, rng: random.Random, size: Size, place: Place) -> Figure:
    """The figure with a size and a place, both a little off as hands draw, and all of it in the picture."""
    radius = rng.uniform(*RADII[size])
    x, y = (min(max(middle + rng.uniform(-OFF, OFF), radius), 1 - radius) for middle in PLACES[place])
    return replace(figure, size=size, place=place, centre=(x, y), radius=radius)


def random_size(rng: random.Random) -> Size:
    """The size of a single figure."""
    return rng.choices(tuple(SIZE_SHARES), tuple(SIZE_SHARES.values()))[0]


def _placed(rng: random.Random, figure: Figure) -> Figure:
    size = random_size(rng)
    place: Place = "centre"
    if size != "big" and rng.random() < 0.5:
        place = rng.choice(tuple(PLACES))
    return placed(figure, rng, size, place)


def _spread(rng: random.Random, figures: tuple[Figure, ...]) -> tuple[Figure, ...]:
    """The figures side by side, all of one size."""
    radius = rng.uniform(0.18, 0.21)
    return tuple(
        replace(figure, centre=(x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)), radius=radius)
        for figure, (x, y) in zip(figures, COUNT_PLACES[len(figures)], strict=True)
    )
