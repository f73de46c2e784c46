"""How well a model draws what it is asked for: questions, answers read from its pictures, shares with error bars."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from library.scenes.drawing import Picture
from library.scenes.making import placed, random_size
from library.scenes.reading import read
from library.scenes.wording import caption
from library.scenes.world import (
    COLOURS,
    FREEHAND,
    NEW_COLOURS,
    PLACES,
    SHAPES,
    Figure,
    Place,
    Scene,
    combinations,
)

PROPERTIES = ("ground", "count", "colour", "shape", "place", "size")
TAUGHT_COLOURS = ("red", "yellow", "blue", "white")
TAUGHT_SHAPES = ("circle", "square", "heart", "diamond")
TAUGHT_GROUNDS = ("black", "green", "white", "brown")
TAUGHT_PLACES: tuple[Place, ...] = ("centre", "left", "top")
"""What the pictures of a new shape or colour show; questions about it ask for the others."""
SURE = 1.96  # half the width of a 95 % interval in standard deviations


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the one flat figure that its picture has to show."""

    prompt: str
    scene: Scene

    def answer(self, picture: Picture) -> dict[str, bool]:
        """Which properties the picture (H, W, 3) has right. Without a figure all but the ground are wrong."""
        wanted, seen = self.scene.figures[0], read(picture)
        right = dict.fromkeys(PROPERTIES, False) | {"ground": seen.ground == self.scene.ground}
        if seen.figures:
            found = seen.figures[0]
            right["count"] = len(seen.figures) == 1
            right |= {name: getattr(found, name) == getattr(wanted, name) for name in PROPERTIES[2:]}
        return right


@dataclass(frozen=True, slots=True)
class Share:
    """How many of ``asked`` were right."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        """The share, 0..1."""
        return self.right / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share (Wilson 1927, equation 4)."""
        if not self.asked:
            return 0.0, 1.0
        z2 = SURE**2 / self.asked
        middle = (self.value + z2 / 2) / (1 + z2)
        half = SURE / (1 + z2) * math.sqrt(self.value * (1 - self.value) / self.asked + z2 / (4 * self.asked))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:5.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def questions(count: int, rng: random.Random) -> list[Question]:
    """Prompts for one flat figure each, of combinations of shape, colour and ground that no training scene shows."""
    held_out = combinations(held_out=True)
    kinds = [kind for _ in range(-(-count // len(held_out))) for kind in rng.sample(held_out, len(held_out))]
    return [_question(Figure(shape, colour), ground, rng) for shape, colour, ground in kinds[:count]]


def _question(figure: Figure, ground: str, rng: random.Random) -> Question:
    size = random_size(rng)
    place: Place = "centre" if size == "big" or rng.random() < 0.5 else rng.choice(tuple(PLACES))
    scene = Scene((placed(figure, rng, size, place),), ground)
    return Question(caption(scene, rng), scene)


def subject_questions(subject: str, word: str, count: int, rng: random.Random) -> list[Question]:
    """Prompts for a new shape or colour by its ``word``, with things, on grounds and at places that its pictures never
    show.
    """
    places: list[Place] = [place for place in PLACES if place not in TAUGHT_PLACES]
    scenes = [_subject_scene(rng.choice(_kinds(subject, taught=False)), rng.choice(places), rng) for _ in range(count)]
    return [Question(subject_caption(scene, word, rng), scene) for scene in scenes]


def subject_scenes(subject: str, count: int, rng: random.Random) -> list[Scene]:
    """Pictures that teach a new shape or colour: with few things, grounds and places, each about as often."""
    kinds, places = _kinds(subject, taught=True), list(TAUGHT_PLACES)
    chosen = rng.sample(kinds * -(-count // len(kinds)), count)
    where = rng.sample((places * -(-count // len(places)))[:count], count)
    return [_subject_scene(kind, place, rng) for kind, place in zip(chosen, where, strict=True)]


def _kinds(subject: str, taught: bool) -> list[tuple[Figure, str]]:
    """Figures of the subject and their grounds: all that its pictures may show, or all that they never show."""
    grounds = [ground for ground in COLOURS if (ground in TAUGHT_GROUNDS) == taught]
    if subject in NEW_COLOURS:
        figures = [Figure(shape, subject) for shape in SHAPES if (shape in TAUGHT_SHAPES) == taught]
    else:
        figures = [Figure(subject, colour) for colour in COLOURS if (colour in TAUGHT_COLOURS) == taught]
    return [(figure, ground) for figure in figures for ground in grounds if figure.colour != ground]


def _subject_scene(kind: tuple[Figure, str], place: Place, rng: random.Random) -> Scene:
    figure, ground = kind
    return Scene((placed(figure, rng, "medium", place),), ground)


def subject_caption(scene: Scene, word: str, rng: random.Random) -> str:
    """The caption of a subject's picture, with its ``word`` in place of the new shape or colour.

    Without a word a new shape is a "shape", and a new colour is left out.
    """
    (figure,) = scene.figures
    named = replace(figure, colour=word) if figure.colour in NEW_COLOURS else replace(figure, shape=word or FREEHAND)
    return caption(replace(scene, figures=(named,)), rng)


def shares(answers: Iterable[dict[str, bool]]) -> dict[str, Share]:
    """The share of right answers for each property."""
    given = list(answers)
    return {name: Share(sum(answer[name] for answer in given), len(given)) for name in PROPERTIES}


def shows(picture: Picture, subject: str) -> bool:
    """True if the picture's largest figure has this shape or colour more than any other."""
    figures = read(picture).figures
    return bool(figures) and subject in (figures[0].shape, figures[0].colour)
