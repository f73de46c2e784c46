"""Captions at training time: what the stored text becomes for one visit of an image.

`render` is a fixed sequence of small pure functions; every draw comes from the generator that the caller gives, so a
caption is a function of (text, rules, clock, seed). Tokens and weights are not the business of this file.

Differences from the reference, all on purpose: the keep_tokens_separator is always read (not only when something is
shuffled); tags are joined by the configured separator, also where the secondary separator stood; empty tags are
dropped; a fractional warm-up is computed from the planned steps each time.
"""

from __future__ import annotations

import random
import re

from library.data.records import CaptionClock, CaptionRules

_WILDCARD = re.compile(r"\{([^}]+)\}")
# Private-use characters stand for the doubled braces while the groups are replaced; captions do not contain them.
_OPEN_BRACE, _CLOSE_BRACE = "\ue000", "\ue001"
_PLAIN_GROUP = re.compile(r"\{[^{}]+\}")


def render(text: str, rules: CaptionRules, clock: CaptionClock, rng: random.Random) -> str:
    """The caption of one visit: prefix and suffix, dropout, wildcards, tags, secondary separator, in this order.

    ``rng`` is the visit's own generator. A dropped caption is the empty text and no further rule acts on it.
    """
    return "" if is_dropped(rules, clock, rng) else render_kept(text, rules, clock, rng)


def render_kept(text: str, rules: CaptionRules, clock: CaptionClock, rng: random.Random) -> str:
    """The caption of a visit that does not drop it; any of the templates, if there are some."""
    if rules.templates:
        return rng.choice(rules.templates)
    text = add_prefix_and_suffix(text, rules)
    if rules.enable_wildcard:
        text = choose_wildcards(text, rng)
    text = process_tags(text, rules, clock, rng)
    return replace_secondary_separator(text, rules)


def is_dropped(rules: CaptionRules, clock: CaptionClock, rng: random.Random) -> bool:
    """True if the whole caption is left out: by chance, or because the epoch is a multiple of the given number."""
    if rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate:
        return True
    every = rules.caption_dropout_every_n_epochs
    return every > 0 and clock.epoch % every == 0


def add_prefix_and_suffix(text: str, rules: CaptionRules) -> str:
    """``prefix text suffix`` with one blank between them; an empty prefix or suffix adds nothing."""
    if rules.caption_prefix:
        text = f"{rules.caption_prefix} {text}"
    if rules.caption_suffix:
        text = f"{text} {rules.caption_suffix}"
    return text


def choose_wildcards(text: str, rng: random.Random) -> str:
    """Each group ``{a|b|c}`` becomes one of its alternatives, uniformly; ``{{`` and ``}}`` become plain braces.

    One pass, no nesting: a brace without a partner is ordinary text.
    """
    if "{" not in text and "}" not in text:
        return text
    text = _protected(text)
    text = _WILDCARD.sub(lambda group: rng.choice(group.group(1).split("|")), text)
    return text.replace(_OPEN_BRACE, "{").replace(_CLOSE_BRACE, "}")


def has_odd_braces(text: str) -> bool:
    """True if `choose_wildcards` takes single braces of a text for text: without a partner, empty, or nested ones."""
    rest = _PLAIN_GROUP.sub("", _protected(text))
    return "{" in rest or "}" in rest


def _protected(text: str) -> str:
    return text.replace("{{", _OPEN_BRACE).replace("}}", _CLOSE_BRACE)


def process_tags(text: str, rules: CaptionRules, clock: CaptionClock, rng: random.Random) -> str:
    """Warm-up, shuffle and dropout of the flexible tags between the fixed head and tail.

    A caption that none of these rules concerns keeps its form literally.
    """
    marked = bool(rules.keep_tokens_separator) and rules.keep_tokens_separator in text
    acting = rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0
    if not marked and not acting:
        return text
    head, flexible, tail = split_tags(text, rules)
    flexible = flexible[: warmed_up(len(flexible), rules, clock)]
    if rules.shuffle_caption:
        rng.shuffle(flexible)
    if rules.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= rules.caption_tag_dropout_rate]
    return glue_of(rules.caption_separator).join([*head, *flexible, *tail])


def split_tags(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Fixed head, flexible middle and fixed tail, as lists of stripped tags without empty ones.

    With the keep_tokens_separator in the text its first occurrence ends the head and its second begins the tail (later
    ones are ordinary text), and keep_tokens is ignored; otherwise the first keep_tokens tags are the head.
    """
    mark = rules.keep_tokens_separator
    if mark and mark in text:
        parts = [_tags(part, rules.caption_separator) for part in text.split(mark, 2)]
        return parts[0], parts[1], parts[2] if len(parts) == 3 else []
    tags = _tags(text, rules.caption_separator)
    keep = max(rules.keep_tokens, 0)
    return tags[:keep], tags[keep:], []


def warmed_up(count: int, rules: CaptionRules, clock: CaptionClock) -> int:
    """How many of ``count`` flexible tags are in use at the clock's step.

    ``token_warmup_step`` below 1 is a fraction of the planned steps; from 1 on it is a number of steps.
    """
    last = rules.token_warmup_step
    steps = int(last * clock.max_train_steps) if last < 1 else last
    if steps <= 0 or clock.step >= steps:
        return count
    grown = int(clock.step * (count - rules.token_warmup_min) / steps)
    return max(0, min(count, grown + rules.token_warmup_min))


def replace_secondary_separator(text: str, rules: CaptionRules) -> str:
    """Tags that were kept together by the secondary separator become ordinary neighbours."""
    mark = rules.secondary_separator
    if not mark or mark not in text:
        return text
    pieces = [piece.strip() for piece in text.split(mark)]
    return glue_of(rules.caption_separator).join(piece for piece in pieces if piece)


def glue_of(separator: str) -> str:
    """What is put between tags: the separator and a blank, unless it ends in white space itself."""
    return separator if separator[-1:].isspace() else f"{separator} "


def _tags(text: str, separator: str) -> list[str]:
    return [tag for piece in text.split(separator) if (tag := piece.strip())]
