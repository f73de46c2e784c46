"""The text files beside images, gathered into a metadata file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from library.log import UserError, progress
from library.options.preparation import MergeTextOptions
from library.preparation.files import find_images, image_key, read_text, with_extension
from library.preparation.metadata import MetadataFile
from library.preparation.outcome import Outcome

logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".txt", ".caption", ".tags", ".git")


def merge_texts(options: MergeTextOptions, field: str) -> Outcome:
    """Set ``field`` ("caption", "tags") of each image to the whole text beside it.

    Raises UserError if no image has a text with the wanted ending. Images without a text are named and passed over.
    In memory nothing but the entries is held.
    """
    if options.recursive and not options.full_path:
        raise UserError("--recursive needs --full_path: equal names of different folders would be one image")
    images = find_images(str(options.train_data_dir), options.recursive)
    _check_extension(images, options)
    metadata = MetadataFile.open(str(options.out_json), options.in_json)
    outcome, seen = Outcome(), dict[str, str]()
    for image in progress(images, f"merging {field}"):
        try:
            text = read_text(with_extension(image, options.caption_extension))
        except ValueError as error:
            outcome.fail(str(image), str(error))
            continue
        key = image_key(image, options.full_path)
        if key in seen:
            logger.warning("%s and %s have the same key %r: one entry serves both", seen[key], image.name, key)
        seen[key] = image.name
        metadata.set(key, field, text)
        outcome.done += 1
        if options.debug:
            logger.info("%s: %s", image, text)
    if outcome.done:
        metadata.save()
    return outcome


def _check_extension(images: Sequence[Path], options: MergeTextOptions) -> None:
    """One line instead of one for each image where the whole folder has texts with another ending, or none."""
    if any(with_extension(image, options.caption_extension).exists() for image in images):
        return
    others = Counter(suffix for image in images for suffix in _TEXT_SUFFIXES if image.with_suffix(suffix).exists())
    way_out = "write captions first, or say how their names end"
    if others:
        suffix, count = others.most_common(1)[0]
        way_out = f"{count} have {suffix}: if that is the text, give --caption_extension {suffix}"
    raise UserError(
        f"--caption_extension {options.caption_extension}: none of the {len(images)} images in "
        f"{options.train_data_dir} has such a file beside it; {way_out}"
    )
