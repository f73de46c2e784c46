"""Which caption file belongs to an image, and what is said of images and folders without one."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence

from library.data.captions import add_prefix_and_suffix, has_odd_braces
from library.data.face_names import without_face
from library.data.index import CAPTION_EXTENSIONS, FolderContent
from library.data.records import ImageRecord, SubsetSpec
from library.log import some_of

logger = logging.getLogger(__name__)

_NEVER_CAPTIONS = (".json", ".xml", ".xmp", ".yaml", ".yml", ".csv", ".html")
_GLANCE_BYTES = 4096


def name_for(image: str, content: FolderContent, extensions: tuple[str, ...]) -> str | None:
    """The caption file of an image: of its own stem first, then of the stem without a face suffix."""
    stem = _stem(image)
    return _of_stem(stem, content, extensions) or _of_stem(without_face(stem), content, extensions)


def problems_without(subset: SubsetSpec, content: FolderContent, extensions: tuple[str, ...]) -> list[str]:
    """What is wrong with a subset none of whose images has a caption; of what only may be wrong it warns.

    Class tokens are the way to train without captions, unless captions of the usual endings are left unread.
    """
    endings = Counter(os.path.splitext(name)[1] for name in content.others)
    usual = [end for end in endings if end.lower() in CAPTION_EXTENSIONS and end not in extensions]
    unread = [f"there are {endings[end]} {end} files" for end in usual]
    likely = _text_beside_each(content)
    wanted = " or ".join(extensions)
    if subset.class_tokens and not unread:
        if likely is not None:
            logger.warning(
                "%s: no image has a caption file (%s), but each has a text file %s: if these are captions, set"
                " caption_extension to %s",
                subset.name,
                wanted,
                likely,
                likely,
            )
        return []
    unread += [] if likely is None else [f"there is a {likely} file for each image"]
    hint = f" ({' and '.join(unread)}: set caption_extension)" if unread else ""
    ways = "captions" if subset.conditioning_data_dir is not None else "captions or class_tokens"
    return [
        f"{subset.name}: no image has a caption file ({wanted}){hint};"
        f"{'' if subset.class_tokens else f' add {ways}, or'} allow it with --allow_captionless"
    ]


def problems_of_name(subset: SubsetSpec) -> list[str]:
    """What is wrong with class tokens that come from the name of a folder: names of files need not be text."""
    tokens = subset.class_tokens or ""
    if tokens.encode("utf-8", "ignore").decode() == tokens:
        return []
    return [f"{subset.name}: the folder's name is not UTF-8 text and is to be a caption; rename the folder"]


def warn_about_missing(subset: SubsetSpec, captionless: Sequence[str], images: int) -> None:
    """Say which of a subset's images have no caption, and what they get instead."""
    if captionless:
        logger.warning(
            "%s: %d of %d images have no caption%s: %s",
            subset.name,
            len(captionless),
            images,
            f" and get {subset.class_tokens!r}" if subset.class_tokens is not None else "",
            some_of(captionless),
        )


def warn_about_cut(subset: SubsetSpec, names: Sequence[str]) -> None:
    """Say which images have more lines in their caption file than the one that counts."""
    if names:
        logger.warning(
            "%s: only the first line of a caption file counts; %d files have more: %s",
            subset.name,
            len(names),
            some_of(names),
        )


def warn_about_braces(subset: SubsetSpec, records: Sequence[ImageRecord]) -> None:
    """Say which captions have braces that were meant as choices, as it seems, and are none."""
    if not subset.captions.enable_wildcard:
        return
    odd = [
        os.path.basename(record.path)
        for record in records
        if has_odd_braces(add_prefix_and_suffix(record.caption, subset.captions))
    ]
    if odd:
        logger.warning(
            "%s: enable_wildcard: %d captions have braces that are nested, empty or not closed: these are trained as"
            " text: %s",
            subset.name,
            len(odd),
            some_of(odd),
        )


def _of_stem(stem: str, content: FolderContent, extensions: tuple[str, ...]) -> str | None:
    for extension in extensions:
        name = stem + extension
        if name in content.captions or name in content.bad_captions:
            return name
    return None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _text_beside_each(content: FolderContent) -> str | None:
    """The unusual ending of which there is a text file for every image of a folder, if there is one."""
    stems = {_stem(name) for name in content.images}
    found: dict[str, set[str]] = {}
    for name in content.others:
        stem, ending = os.path.splitext(name)
        if stem in stems and ending and ending.lower() not in (*CAPTION_EXTENSIONS, *_NEVER_CAPTIONS):
            found.setdefault(ending, set()).add(stem)
    complete = sorted(ending for ending, beside in found.items() if beside == stems)
    one = min(stems, default="")
    return next((ending for ending in complete if _is_text(content.path(one + ending))), None)


def _is_text(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(_GLANCE_BYTES)
    except OSError:
        return False
    text = start.decode("utf-8", "ignore").encode()
    return bool(start.strip()) and b"\0" not in start and len(start) - len(text) < 4  # a letter may be cut at the end
