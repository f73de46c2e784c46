"""Captions that the reference rendered: each must be one that ours can render too.

Ours differs on purpose in three points, which `plain` takes out of both sides: tags are joined by the configured
separator (the reference always uses a comma and a blank, and none where a secondary separator stood), empty tags are
dropped, and a caption with the keep_tokens_separator is always parsed.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from library.data.captions import render
from library.data.records import CaptionClock, CaptionRules

ROWS: list[dict[str, Any]] = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "dataset" / "captions.json.gz").read_bytes())
)
PLANNED_STEPS = 20
CASES = {json.dumps(row["subset"]): row["subset"] for row in ROWS}


def plain(text: str, settings: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Head and rest as tags; the rest sorted if it is shuffled, since 720 orders cannot all be drawn."""
    separator = settings.get("caption_separator", ",")
    if separator == " ":  # the reference's ", " between the words is not a part of them
        tags = sorted(word.strip(",") for word in text.split() if word.strip(","))
    else:
        tags = [tag.strip() for tag in text.split(separator) if tag.strip()]
    keep = settings.get("keep_tokens", 0)
    rest = sorted(tags[keep:]) if settings.get("shuffle_caption") else tags[keep:]
    return tuple(tags[:keep]), tuple(rest)


def ours_of(row: dict[str, Any], draws: int) -> set[str]:
    rules = CaptionRules(**row["subset"])
    clock = CaptionClock(row["epoch"], row["step"], PLANNED_STEPS)
    return {render(row["caption"], rules, clock, random.Random(seed)) for seed in range(draws)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_captions_can_come_out(case: str) -> None:
    settings = CASES[case]
    rows = [row for row in ROWS if row["subset"] == settings]
    assert len(rows) == 27
    is_tag_dropout = "caption_tag_dropout_rate" in settings
    for row in rows:
        if is_tag_dropout and row["caption"].startswith("  "):
            continue  # an empty tag counts in the reference's draws
        ours = {plain(text, settings) for text in ours_of(row, 3000 if is_tag_dropout else 60)}
        for output in row["outputs"]:
            assert plain(output, settings) in ours, (row["caption"], output)


def test_literal_where_no_rule_acts() -> None:
    for row in ROWS:
        if row["subset"] in ({}, {"caption_prefix": "PRE,", "caption_suffix": ", SUF"}):
            assert ours_of(row, 3) == set(row["outputs"])
