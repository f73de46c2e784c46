"""What a stored caption becomes: every rule, alone and in its place."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import render
from library.data.records import CaptionClock, CaptionRules

CLOCK = CaptionClock(epoch=1, step=0, max_train_steps=100)
TAGS = st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=8, unique=True)


def drawn(text: str, clock: CaptionClock = CLOCK, draws: int = 300, **rules: Any) -> set[str]:
    made = CaptionRules(**rules)
    return {render(text, made, clock, random.Random(seed)) for seed in range(draws)}


@pytest.mark.parametrize(
    ("rules", "text", "results"),
    [
        ({}, "a , b,c", {"a , b,c"}),
        ({"shuffle_caption": True}, "a,b", {"a, b", "b, a"}),
        ({"shuffle_caption": True, "keep_tokens": 1}, "a , b,c", {"a, b, c", "a, c, b"}),
        ({"shuffle_caption": True, "keep_tokens": 5}, "a,b", {"a, b"}),
        ({"shuffle_caption": True}, "a , ,b,,", {"a, b", "b, a"}),
        ({"secondary_separator": ";;;"}, "a, s;;;t, b", {"a, s, t, b"}),
        ({"enable_wildcard": True}, "x {a|b|} y {{lit}} {c}", {f"x {word} y {{lit}} c" for word in ("a", "b", "")}),
        ({"enable_wildcard": True}, "{}", {"{}"}),
        ({"enable_wildcard": True}, "{a|{b|c}}", {"{a|{b|c}"}),
        ({"enable_wildcard": True}, "{a|b}}", {"{a|b}"}),
        ({"enable_wildcard": True}, "{{{a|b}}}", {"{a", "{b}"}),
        ({"enable_wildcard": True, "shuffle_caption": True}, "{a, b|c}, d", {"c, d", "d, c"} | {
            ", ".join(order) for order in (("a", "b", "d"), ("a", "d", "b"), ("b", "a", "d"), ("b", "d", "a"),
                                           ("d", "a", "b"), ("d", "b", "a"))}),
        ({"caption_prefix": "a,", "caption_suffix": ", d"}, "b, c", {"a, b, c , d"}),
        ({"caption_prefix": "p", "caption_dropout_rate": 0.5}, "a", {"p a", ""}),
        ({"caption_prefix": "{p|q}", "enable_wildcard": True}, "a", {"p a", "q a"}),
        ({"caption_tag_dropout_rate": 0.5, "keep_tokens": 1}, "a,b,c", {"a", "a, b", "a, c", "a, b, c"}),
        ({"caption_tag_dropout_rate": 1.0}, "a,b", {""}),
        ({"caption_separator": ".", "shuffle_caption": True, "keep_tokens": 2}, "a. b. c", {"a. b. c"}),
        ({"caption_separator": " ", "shuffle_caption": True}, "a b", {"a b", "b a"}),
    ],
)  # fmt: skip
def test_results(rules: dict[str, Any], text: str, results: set[str]) -> None:
    assert drawn(text, **rules) == results


MARKED = {"keep_tokens_separator": "|||", "keep_tokens": 3}


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("f1, f2 ||| x, y", {"f1, f2, x, y", "f1, f2, y, x"}),
        ("f1, f2 ||| x, y ||| z1, , z2", {"f1, f2, x, y, z1, z2", "f1, f2, y, x, z1, z2"}),
        ("f1 ||| x, y ||| z1 ||| z2", {"f1, x, y, z1 ||| z2", "f1, y, x, z1 ||| z2"}),
    ],
)
def test_keep_tokens_separator(text: str, results: set[str]) -> None:
    assert drawn(text, shuffle_caption=True, **MARKED) == results
    assert drawn(text, **MARKED) == {min(results)}, "the mark is not trained as text when nothing is shuffled"


def test_secondary_separator_keeps_tags_together() -> None:
    results = drawn("a, s;;;t, b", shuffle_caption=True, secondary_separator=";;;")
    assert results == {"a, s, t, b", "a, b, s, t", "s, t, a, b", "s, t, b, a", "b, a, s, t", "b, s, t, a"}


@pytest.mark.parametrize(
    ("rules", "step", "text", "result"),
    [
        ({"token_warmup_step": 0.5}, 25, "a,b,c,d,e", "a, b, c"),
        ({"token_warmup_step": 50}, 0, "a,b,c,d,e", "a"),
        ({"token_warmup_step": 50, "keep_tokens": 2}, 0, "a,b,c,d", "a, b, c"),
        ({"token_warmup_step": 50, "token_warmup_min": 4}, 0, "a,b", "a, b"),
        ({"token_warmup_step": 1.0}, 1, "a,b,c", "a, b, c"),
        ({"token_warmup_step": 50}, 50, "a,b,c,d,e", "a, b, c, d, e"),
    ],
)
def test_warm_up(rules: dict[str, Any], step: int, text: str, result: str) -> None:
    assert drawn(text, CaptionClock(1, step, 100), **rules) == {result}


def test_warm_up_fraction_follows_the_planned_steps() -> None:
    rules = CaptionRules(token_warmup_step=0.5)
    texts = [render("a,b,c,d,e", rules, CaptionClock(1, 25, planned), random.Random(0)) for planned in (0, 50, 100)]
    assert texts == ["a, b, c, d, e", "a, b, c, d, e", "a, b, c"]


def test_dropout_in_every_second_epoch_only() -> None:
    rules = {"caption_dropout_every_n_epochs": 2, "caption_prefix": "p", "caption_suffix": "s"}
    assert [drawn("a", CaptionClock(epoch, 0, 9), **rules) for epoch in (1, 2, 3, 4)] == [{"p a s"}, {""}] * 2


def test_probabilities() -> None:
    whole = CaptionRules(caption_dropout_rate=0.25)
    tags = CaptionRules(caption_tag_dropout_rate=0.25)
    texts = [render("a", whole, CLOCK, random.Random(seed)) for seed in range(2000)]
    assert 0.2 < texts.count("") / 2000 < 0.3
    kept = [len(render("a,b,c,d", tags, CLOCK, random.Random(seed)).split(", ")) for seed in range(1000)]
    assert 2.8 < sum(kept) / 1000 < 3.2


@given(TAGS, st.integers(0, 9), st.floats(0, 1), st.booleans(), st.integers(0, 2**32))
def test_fixed_head_stays_and_no_tag_is_invented(
    tags: list[str], keep: int, rate: float, shuffle: bool, seed: int
) -> None:
    rules = CaptionRules(shuffle_caption=shuffle, keep_tokens=keep, caption_tag_dropout_rate=rate)
    text = render(",".join(tags), rules, CLOCK, random.Random(seed))
    result = text.split(", ") if text else []
    if shuffle or rate > 0:
        assert result[: len(tags[:keep])] == tags[:keep]
        assert len(set(result)) == len(result)
        assert set(result) <= set(tags)
    else:
        assert text == ",".join(tags)


@given(st.text(max_size=40), st.integers(0, 2**32))
def test_any_text_renders_and_the_same_seed_gives_the_same(text: str, seed: int) -> None:
    rules = CaptionRules(
        shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.3, keep_tokens_separator="|||",
        secondary_separator=";;;", caption_prefix="p", token_warmup_step=0.5,
    )  # fmt: skip
    assert render(text, rules, CLOCK, random.Random(seed)) == render(text, rules, CLOCK, random.Random(seed))


@given(st.text(max_size=40))
def test_no_rules_no_change(text: str) -> None:
    assert render(text, CaptionRules(), CLOCK, random.Random(0)) == text
