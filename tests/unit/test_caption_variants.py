"""Captions known ahead: every text that a visit takes is among them, whatever the run, and all of them are taken."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.caption_variants import captions_of, choose_caption, variant_of, variants_of
from library.data.captions import render
from library.data.dataset import TrainImages
from library.data.plan import plan_epoch
from library.data.records import CaptionClock, CaptionRules, DatasetKind, DatasetSpec, ImageRecord, SubsetSpec
from library.data.spec_checks import uncacheable_captions
from tests.data_fixtures import cover_fit, dataset, record, write_picture

CLOCK = CaptionClock(1, 0, 100)
TEXTS = st.text("ab,{}| ;", max_size=20)
RULES = st.builds(
    CaptionRules,
    caption_prefix=st.sampled_from(["", "pre,"]),
    caption_suffix=st.sampled_from(["", "suf"]),
    shuffle_caption=st.booleans(),
    keep_tokens=st.integers(0, 2),
    keep_tokens_separator=st.sampled_from(["", "|||"]),
    secondary_separator=st.sampled_from(["", ";"]),
    enable_wildcard=st.booleans(),
    caption_dropout_rate=st.sampled_from([0.0, 0.5, 1.0]),
    caption_dropout_every_n_epochs=st.integers(0, 3),
    caption_tag_dropout_rate=st.sampled_from([0.0, 0.5]),
)


def image(caption: str, name: str = "a.png", folder: str = "x", key: str = "0.0/a") -> ImageRecord:
    return ImageRecord(key, f"{folder}/{name}", (64, 64), caption, 1, False, 0)


@given(TEXTS, RULES, st.integers(1, 5), st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 99))
def test_every_choice_is_known_ahead(
    text: str, rules: CaptionRules, variants: int, seed: int, epoch: int, step: int
) -> None:
    chosen = choose_caption(image(text), rules, CaptionClock(epoch, step, 100), random.Random(seed), variants)
    assert chosen in captions_of(image(text), rules, variants)


@given(TEXTS, RULES, st.integers(0, 10**6), st.integers(1, 9))
def test_without_variants_nothing_changes(text: str, rules: CaptionRules, seed: int, epoch: int) -> None:
    clock = CaptionClock(epoch, 0, 100)
    fresh = render(text, rules, clock, random.Random(seed))
    assert choose_caption(image(text), rules, clock, random.Random(seed), 0) == fresh
    if not rules.is_varied:
        assert choose_caption(image(text), rules, clock, random.Random(seed), 3) == fresh
        assert variants_of(image(text), rules, 0) == variants_of(image(text), rules, 3)


@given(TEXTS, RULES, st.integers(1, 5))
def test_a_variant_is_one_of_the_texts_that_the_rules_can_make(text: str, rules: CaptionRules, variants: int) -> None:
    kept = replace(rules, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    made = variants_of(image(text), rules, variants)
    assert 1 <= len(made) <= variants
    assert len(set(made)) == len(made)
    if not rules.is_varied:
        assert made == (render(text, kept, CLOCK, random.Random(0)),)
    elif not rules.enable_wildcard and not rules.caption_tag_dropout_rate and not rules.secondary_separator:
        plain = render(text, kept, CLOCK, random.Random(0))
        assert {tuple(sorted(one.split(", "))) for one in made} == {tuple(sorted(plain.split(", ")))}


def test_more_variants_keep_the_first_ones_and_all_are_visited() -> None:
    one, rules = image("a, b, c, d, e, f, g"), CaptionRules(shuffle_caption=True)
    six, three = variants_of(one, rules, 6), variants_of(one, rules, 3)
    assert six[:3] == three
    assert len(six) == 6
    rng = random.Random(5)
    assert {choose_caption(one, rules, CLOCK, rng, 6) for _ in range(200)} == set(six)


def test_variants_belong_to_the_file_name_not_to_place_or_run() -> None:
    rules, text = CaptionRules(shuffle_caption=True), "a, b, c, d, e, f, g"
    here = variants_of(image(text), rules, 4)
    assert variants_of(image(text, folder="elsewhere", key="7.3/z"), rules, 4) == here
    assert variants_of(image(text, name="b.png"), rules, 4) != here


def test_dropping_is_decided_at_the_visit() -> None:
    rules = CaptionRules(shuffle_caption=True, caption_dropout_every_n_epochs=2)
    one = image("a, b, c")
    assert captions_of(one, rules, 2)[-1] == ""
    assert choose_caption(one, rules, CaptionClock(2, 0, 9), random.Random(0), 2) == ""
    assert choose_caption(one, rules, CaptionClock(3, 0, 9), random.Random(0), 2) != ""
    often = replace(rules, caption_dropout_every_n_epochs=0, caption_dropout_rate=0.3)
    empty = sum(choose_caption(one, often, CLOCK, random.Random(seed), 2) == "" for seed in range(2000))
    assert empty == pytest.approx(600, abs=80)


def test_batches_of_any_run_hold_known_texts(tmp_path: Path) -> None:
    rules = CaptionRules(shuffle_caption=True, caption_dropout_rate=0.2)
    paths = [write_picture(tmp_path / f"{index}.png", (32, 32), index) for index in range(3)]
    data = dataset([record(path, (32, 32)) for path in paths], [cover_fit((32, 32), (32, 32))] * 3, captions=rules)
    known = {text for one in data.records for text in captions_of(one, rules, 2)}
    seen: dict[int, list[dict[str, str]]] = {}
    for seed in (1, 2):
        images = TrainImages([data], None, seed, caption_variants=2)
        micros = [step.micro_batches[0] for epoch in range(1, 9) for step in plan_epoch([data], seed, epoch, 1, 1)]
        for order in (micros, micros[::-1]):
            batches = [images.load(micro, 0, 1, CLOCK) for micro in order]
            texts = {key: text for batch in batches for key, text in zip(batch.keys, batch.captions, strict=True)}
            seen.setdefault(seed, []).append(texts)
            assert {text for batch in batches for text in batch.captions} <= known
    assert seen[1][0] == seen[1][1]
    assert variant_of(data.records[0], rules, 0) in known


def spec(**rules: Any) -> DatasetSpec:
    subset = SubsetSpec(image_dir="cats", captions=CaptionRules(**rules))
    return DatasetSpec(DatasetKind.DREAMBOOTH, 1, None, (SubsetSpec(image_dir="fine"), subset))


@pytest.mark.parametrize(
    ("rules", "variants", "words"),
    [
        ({"shuffle_caption": True, "caption_tag_dropout_rate": 0.1}, 0, "shuffle_caption and caption_tag_dropout_rate"),
        ({"enable_wildcard": True}, 0, "--cache_text_encoder_outputs_variants, or switch off"),
        ({"token_warmup_step": 5.0}, 3, "token_warmup_step"),
    ],
)
def test_one_line_names_the_rules_and_the_ways_out(rules: dict[str, Any], variants: int, words: str) -> None:
    (line,) = uncacheable_captions([spec(**rules)], variants)
    assert line.startswith("cats: ")
    assert words in line


def test_dropout_alone_needs_no_variants() -> None:
    assert uncacheable_captions([spec(caption_dropout_rate=0.5, caption_dropout_every_n_epochs=2)], 0) == ()
    assert uncacheable_captions([spec(shuffle_caption=True, enable_wildcard=True)], 2) == ()
