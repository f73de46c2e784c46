"""Cleaning a whole metadata file, or showing what cleaning would change."""

from __future__ import annotations

import logging
from collections.abc import Callable

from library.log import UserError, progress
from library.options.preparation import CleanOptions
from library.preparation.cleaning import clean_caption, clean_tags
from library.preparation.metadata import MetadataFile
from library.preparation.outcome import Outcome

logger = logging.getLogger(__name__)
_CLEANERS: tuple[tuple[str, Callable[[str, bool], str]], ...] = (("tags", clean_tags), ("caption", clean_caption))


def clean_metadata(options: CleanOptions) -> Outcome:
    """Clean each image's tags and caption. Raises UserError.

    An image that lacks one of the two is named; what it has is cleaned.
    """
    source, target = str(options.in_json), options.out_json
    if options.third_word is not None:
        logger.warning("%s: passed over: the folder of the images is not needed any more", source)
        source, target = str(target), options.third_word
    if target is None and not options.dry_run:
        raise UserError("out_json is missing")
    metadata = MetadataFile.open(target or source, source)
    outcome, changed = Outcome(), 0
    lacking = {field: 0 for field, _ in _CLEANERS}
    for key in progress(list(metadata.entries), "cleaning"):
        found = 0
        for field, clean in _CLEANERS:
            before = metadata.text(key, field)
            if before is None:
                lacking[field] += 1
                continue
            after = clean(before, options.legacy_rules)
            _show(key, field, before, after, options)
            metadata.entries[key][field] = after
            changed += after != before
            found += 1
        if found:
            outcome.done += 1
        else:
            outcome.fail(key, "has neither tags nor a caption")
    for field, count in lacking.items():
        if count:
            logger.warning("%d of %d images have no %s", count, len(metadata.entries), field)
    if not options.dry_run:
        metadata.save()
    logger.info("%d texts %s", changed, "would change" if options.dry_run else "changed")
    return outcome


def _show(key: str, field: str, before: str, after: str, options: CleanOptions) -> None:
    if options.debug or (options.dry_run and before != after):
        logger.info("%s: %s\n  before: %s\n  after:  %s", key, field, before, after)
