"""Captions of scenes, in several phrasings."""

from __future__ import annotations

import random

from library.scenes.world import Figure, Scene

SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("",), "big": ("big", "large", "huge")}
PLACE_WORDS = {
    "centre": ("", "", "", "in the middle", "in the center"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
}
STYLE_WORDS = {"flat": ("",), "outlined": ("outlined",), "shaded": ("shaded",)}
NUMBERS = {2: "two", 3: "three"}
LEADS = ("", "", "a picture of ", "a drawing of ", "an image of ", "there is ")
MANY_LEADS = ("", "", "a picture of ", "a drawing of ", "there are ")


def caption(scene: Scene, rng: random.Random) -> str:
    """One line that names every figure, its attributes and the ground, phrased at random."""
    what = things(scene, rng)
    texture = "" if scene.ground_texture == "plain" else scene.ground_texture + " "
    ground = f"{texture}{scene.ground} background"
    lead = rng.choice(LEADS if len(scene.figures) == 1 else MANY_LEADS)
    form = rng.randrange(8)
    if form < 5:
        return f"{lead}{what} on {article(ground)}"
    if form < 7:
        return f"{what.removeprefix('a ').removeprefix('an ')}, {ground}"
    return f"{article(ground)} with {what}"


def things(scene: Scene, rng: random.Random) -> str:
    """The figures in words: one, a number of equal ones, or a pair."""
    first, *others = scene.figures
    if not others:
        words = [article(described(first, rng)), rng.choice(PLACE_WORDS[first.place])]
        return " ".join(word for word in words if word)
    if all((other.shape, other.colour) == (first.shape, first.colour) for other in others):
        return f"{NUMBERS[len(scene.figures)]} {plural(described(first, rng))}"
    joined = rng.choice((" and ", " next to ", " beside "))
    return joined.join(article(described(figure, rng)) for figure in scene.figures)


def described(figure: Figure, rng: random.Random) -> str:
    """Adjectives and shape, without an article."""
    texture = "" if figure.texture == "plain" else figure.texture
    words = (rng.choice(SIZE_WORDS[figure.size]), rng.choice(STYLE_WORDS[figure.style]), texture)
    return " ".join(word for word in (*words, figure.colour, figure.shape) if word)


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(words: str) -> str:
    """The last word in its plural."""
    return words + ("es" if words.endswith(("s", "sh")) else "s")
