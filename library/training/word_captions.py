"""Captions of textual inversion: sentences around the new words in place of captions, or captions that hold the words.

The sentences are those of R. Gal et al., "An Image is Worth One Word", arXiv:2208.01618, as trainers of this kind have
them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from library.data.captions import add_prefix_and_suffix
from library.data.records import DatasetSpec, ResolvedDataset
from library.log import UserError
from library.options import EmbeddingOptions

logger = logging.getLogger(__name__)

OBJECT_TEMPLATES = (
    *("a photo of a {}", "a photo of my {}", "a photo of the {}", "a photo of one {}"),
    *("a photo of a clean {}", "a photo of a dirty {}", "a photo of a nice {}", "a photo of a cool {}"),
    *("a photo of a small {}", "a photo of the cool {}", "a photo of the clean {}", "a photo of the nice {}"),
    *("a photo of the small {}", "a photo of the weird {}", "a photo of the large {}"),
    *("a cropped photo of the {}", "a dark photo of the {}", "a bright photo of the {}"),
    *("a good photo of the {}", "a close-up photo of the {}", "a close-up photo of a {}"),
    *("a cropped photo of a {}", "a good photo of a {}", "the photo of a {}"),
    *("a rendering of a {}", "a rendition of a {}", "a rendition of the {}"),
)
STYLE_TEMPLATES = tuple(
    f"{thing} in the style of {{}}"
    for thing in (
        *("a painting", "the painting", "a rendering", "a picture", "a rendition"),
        *("a clean painting", "a dirty painting", "a dark painting", "a cool painting", "a bright painting"),
        *("a good painting", "a nice painting", "a small painting", "a weird painting", "a large painting"),
        # twice each: they are drawn twice as often
        *("a cropped painting", "a cropped painting", "a close-up painting", "a close-up painting"),
    )
)


def uses_templates(options: EmbeddingOptions) -> bool:
    """True if sentences take the place of captions."""
    return options.use_object_template or options.use_style_template


def with_templates(specs: Sequence[DatasetSpec], options: EmbeddingOptions) -> tuple[DatasetSpec, ...]:
    """The data sets with the sentences that the options ask for; objects win over styles."""
    if not uses_templates(options):
        return tuple(specs)
    if options.use_object_template and options.use_style_template:
        logger.warning("--use_style_template has no effect: --use_object_template decides")
    templates = OBJECT_TEMPLATES if options.use_object_template else STYLE_TEMPLATES
    words = " ".join(options.token_string or ())
    sentences = tuple(template.format(words) for template in templates)
    return tuple(
        replace(
            spec,
            subsets=tuple(
                replace(subset, captions=replace(subset.captions, templates=sentences)) for subset in spec.subsets
            ),
        )
        for spec in specs
    )


def require_words(datasets: Sequence[ResolvedDataset], words: Sequence[str]) -> None:
    """Every word must stand, by itself, in some training captions: else nothing teaches it. Raises UserError.

    Captions without any of the words are told of.
    """
    captions = [
        caption for dataset in datasets if not _has_templates(dataset) for caption in _training_captions(dataset)
    ]
    if not captions:
        return
    patterns = {word: re.compile(rf"(?<!\w){re.escape(word)}\d*(?!\w)") for word in words}
    missing = [word for word, pattern in patterns.items() if not any(pattern.search(text) for text in captions)]
    if missing:
        raise UserError(
            f"--token_string: no caption holds the word {', '.join(missing)}; write it into the captions, or add it to"
            " all of them with --caption_prefix, or give --use_object_template or --use_style_template"
        )
    without = sum(not any(pattern.search(text) for pattern in patterns.values()) for text in captions)
    if without and words:
        logger.warning("%d of %d captions hold no new word: nothing is learned from them", without, len(captions))


def _has_templates(dataset: ResolvedDataset) -> bool:
    return any(subset.captions.templates for subset in dataset.spec.subsets)


def _training_captions(dataset: ResolvedDataset) -> list[str]:
    records = (record for record in dataset.records if not record.is_reg)
    return [add_prefix_and_suffix(record.caption, dataset.subset_of(record).captions) for record in records]
