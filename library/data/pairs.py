"""Conditioning pictures and masks: which file of their folder belongs to which image.

A pair has the same name up to the ending: ``photos/cat.jpg`` and ``edges/cat.png``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from library.data.index import FolderContent
from library.data.records import Size

CONDITIONING = "conditioning picture"
MASK = "mask"
_WORTH_SAYING = 0.02  # relative difference of aspect ratios that rounding does not explain


@dataclass(frozen=True)
class Pairing:
    """What was found for the images of a subset, by the images' file names.

    ``paths``: the conditioning picture. ``problems``: why an image has none that can be used. ``unused``: file names
    of pictures that belong to no image. ``stretched``: images whose picture is of another aspect ratio.
    """

    paths: Mapping[str, str]
    problems: Mapping[str, str]
    unused: tuple[str, ...]
    stretched: tuple[str, ...]


def pair(images: Mapping[str, Size], content: FolderContent, what: str) -> Pairing:
    """Find the picture of each image (file name to size in pixels) in the folder of such pictures.

    Where several have the stem of an image, that of its full name counts. ``what`` is the word for them in messages.
    """
    by_stem: dict[str, list[str]] = {}
    for name in (*content.images, *content.bad_images):
        by_stem.setdefault(_stem(name), []).append(name)
    paths: dict[str, str] = {}
    problems: dict[str, str] = {}
    stretched: list[str] = []
    for image, size in images.items():
        candidates = by_stem.get(_stem(image), [])
        found = image if image in candidates else candidates[0] if len(candidates) == 1 else None
        if found is None:
            problems[image] = _why_none(_stem(image), candidates, content.folder, what)
        elif found in content.bad_images:
            problems[image] = f"its {what} {content.path(found)}: {content.bad_images[found].reason}"
        else:
            paths[image] = content.path(found)
            stretched += [image] if _differ(size, content.images[found]) else []
    used = {_stem(image) for image in images}
    unused = tuple(name for stem, names in by_stem.items() if stem not in used for name in names)
    return Pairing(paths, problems, unused, tuple(stretched))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _why_none(stem: str, candidates: Iterable[str], folder: str, what: str) -> str:
    several = ", ".join(candidates)
    if several:
        return f"several {what}s have its name ({several} in {folder}); keep one"
    return f"has no {what}; there is no {stem}.* in {folder}"


def _differ(one: Size, other: Size) -> bool:
    ratio = one[0] * other[1] / (one[1] * other[0])
    return abs(ratio - 1) > _WORTH_SAYING
