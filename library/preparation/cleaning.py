"""Rules that make captions and tags of a metadata file more even. Pure functions over texts.

Two sets of rules: ours, and with ``legacy`` exactly those of the original script. They agree on texts as taggers and
captioners write them (tags between comma and blank, the rating last). Where they differ, the original script damages:
it replaces parts of words ("personal" becomes "girlal"), loses what follows a rating, and takes commas without a
blank for parts of a tag.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

_WORD = r"[\w-]+"
# Features of which several can only mean that several persons are described: it is not known whose they are.
_AMBIGUOUS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:long|short|medium) hair",
        r"(?:bob|hime) cut",
        rf"{_WORD} eyes",
        rf"{_WORD} sleeves|sleeveless",
        rf"ponytail|braid|ahoge|twintails|{_WORD} bun|single hair bun|single side bun|two side up|two tails"
        rf"|{_WORD} braid|sidelocks",
    )
)
_HAIR_LENGTH, _HAIR = _AMBIGUOUS[0], re.compile(rf"{_WORD} hair")
_SINGLE_WORD = re.compile(rf"{_WORD}|hair ornament")
_PLAIN_WORD = re.compile(r"\w+")
_RATING = re.compile(r"rating(?:[ :].*)?")

# What a caption says, and what is written instead; in this order, each until nothing changes.
_GIRL, _GIRLS = "girl", "girls"
REPLACEMENTS: tuple[tuple[str, str], ...] = (
    ("anime anime", "anime"),
    ("young ", ""),
    ("anime girl", _GIRL),
    ("cartoon female", _GIRL),
    ("cartoon lady", _GIRL),
    ("cartoon character", _GIRL),
    ("cartoon woman", _GIRL),
    ("cartoon women", _GIRLS),
    ("cartoon girl", _GIRL),
    ("anime female", _GIRL),
    ("anime lady", _GIRL),
    ("anime character", _GIRL),
    ("anime woman", _GIRL),
    ("anime women", _GIRLS),
    ("lady", _GIRL),
    ("female", _GIRL),
    ("woman", _GIRL),
    ("women", _GIRLS),
    ("people", _GIRLS),
    ("person", _GIRL),
    ("a cartoon figure", "a figure"),
    ("a cartoon image", "an image"),
    ("a cartoon picture", "a picture"),
    ("an anime cartoon image", "an image"),
    ("a cartoon anime drawing", "a drawing"),
    ("a cartoon drawing", "a drawing"),
    ("girl girl", _GIRL),
)


def clean_tags(text: str, legacy: bool = False) -> str:
    """Tags without underscores, the rating, features of unknown owners, and tags that a longer one contains."""
    text = _blanks_for_underscores(text)
    if legacy:
        tags = text.split(", rating")[0].split(", ")
    else:
        tags = [tag for part in text.split(",") if (tag := part.strip()) and not _RATING.fullmatch(tag)]
    if any(word in text for word in ("girls", "boys")):
        tags = _without_ambiguous(tags)
    return ", ".join(_without_contained(tags))


def clean_caption(text: str, legacy: bool = False) -> str:
    """A caption with one word for each kind of person, and without the words for drawings that say nothing."""
    for replace in _substitutions(legacy):
        changed = replace(text)
        while changed != text:
            text, changed = changed, replace(changed)
    return text


def _blanks_for_underscores(text: str) -> str:
    return "^_^".join(part.replace("_", " ") for part in text.split("^_^"))


def _without_ambiguous(tags: Sequence[str]) -> list[str]:
    kept = list(tags)
    for pattern in _AMBIGUOUS:
        if sum(bool(pattern.fullmatch(tag)) for tag in kept) >= 2:
            kept = [tag for tag in kept if not pattern.fullmatch(tag)]

    def is_colour(tag: str) -> bool:
        return bool(_HAIR.fullmatch(tag)) and not _HAIR_LENGTH.fullmatch(tag)

    if sum(map(is_colour, kept)) >= 2:
        kept = [tag for tag in kept if not is_colour(tag)]
    return kept


def _without_contained(tags: Sequence[str]) -> list[str]:
    """Without a single word (``shirt``) that ends another tag behind plain words (``white shirt``)."""
    ends: set[str] = set()
    for tag in tags:
        words = tag.split(" ")
        for place in range(1, len(words)):
            if not _PLAIN_WORD.fullmatch(words[place - 1]):
                break
            ends.add(" ".join(words[place:]))
    return [tag for tag in tags if not (tag in ends and _SINGLE_WORD.fullmatch(tag))]


@cache
def _substitutions(legacy: bool) -> tuple[Callable[[str], str], ...]:
    def of_parts(old: str, new: str) -> Callable[[str], str]:
        return lambda text: text.replace(old, new)

    def of_words(old: str, new: str) -> Callable[[str], str]:
        pattern = re.compile(rf"(?<![\w-]){re.escape(old)}" + ("" if old.endswith(" ") else r"(?![\w-])"))
        return lambda text: pattern.sub(new, text)

    return tuple((of_parts if legacy else of_words)(old, new) for old, new in REPLACEMENTS)
