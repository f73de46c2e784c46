"""Weights in prompts are parsed as the reference does."""

import json
from pathlib import Path

import pytest

from library.text.emphasis import parse_emphasis

DATA = Path(__file__).with_name("data") / "parse_prompt_attention.json"


@pytest.mark.parametrize("vector", json.loads(DATA.read_text(encoding="utf-8")), ids=lambda vector: vector["prompt"])
def test_pieces_equal_the_references(vector: dict) -> None:
    assert [list(piece) for piece in parse_emphasis(vector["prompt"], breaks=True)] == vector["parsed"]
