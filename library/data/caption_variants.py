"""Captions that are known ahead: every text that an image's caption can become, and the one that a visit takes.

Without variants a caption whose text draws cannot change is one text. Captions that vary (shuffled tags, tag dropout,
wildcards) get a given number of variants, drawn from streams of the image's file name and the variant's number: they
do not depend on a run's seed, so runs can share what was made of them. Each visit takes one, by its own stream.
Whether a visit drops the whole caption is decided at the visit in any case.
"""

from __future__ import annotations

import os
import random

from library.data.captions import is_dropped, render, render_kept
from library.data.records import CaptionClock, CaptionRules, ImageRecord
from library.rng import stream

_VARIANT_SEED = 0
_ANY_TIME = CaptionClock(epoch=1, step=0, max_train_steps=1)  # only dropping and the tag warm-up look at the clock


def variants_of(record: ImageRecord, rules: CaptionRules, variants: int) -> tuple[str, ...]:
    """All texts of an image's caption where it is not dropped, in order of their first number, each once.

    ``variants``: forms of a caption that varies, at least 1; a caption that does not vary has one text. The rules must
    have no tag warm-up.
    """
    count = variants if rules.is_varied else 1
    return tuple(dict.fromkeys(variant_of(record, rules, number) for number in range(count)))


def captions_of(record: ImageRecord, rules: CaptionRules, variants: int) -> tuple[str, ...]:
    """All texts that visits of an image can have: `variants_of`, and the empty one if the caption can be dropped."""
    texts = variants_of(record, rules, variants)
    return tuple(dict.fromkeys((*texts, ""))) if rules.can_drop else texts


def variant_of(record: ImageRecord, rules: CaptionRules, number: int) -> str:
    """Variant ``number`` (from 0) of an image's caption."""
    rng = stream(_VARIANT_SEED, "caption variant", os.path.basename(record.path), number)
    return render_kept(record.caption, rules, _ANY_TIME, rng)


def choose_caption(
    record: ImageRecord, rules: CaptionRules, clock: CaptionClock, rng: random.Random, variants: int
) -> str:
    """The caption of one visit, ``rng`` being the visit's own generator.

    With ``variants`` 0 it is rendered freshly; otherwise it is one of `captions_of`.
    """
    if not variants or not rules.is_varied:
        return render(record.caption, rules, clock, rng)
    if is_dropped(rules, clock, rng):
        return ""
    return variant_of(record, rules, rng.randrange(variants))
