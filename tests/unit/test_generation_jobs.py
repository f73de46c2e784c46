"""Grammar, seeds and batches of image generation, as properties."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.generation.denoise import Guidance
from library.generation.engine import geometry_of
from library.generation.jobs import (
    DeepShrink,
    GradualLatent,
    Job,
    Seeds,
    Shared,
    SizeCondition,
    batches,
    first_stage,
    own_seed,
)
from library.generation.lines import parse_line
from library.generation.output import job_from_json
from library.generation.variants import expand
from library.log import UserError

PLAIN = Shared(512, 512, 20, "ddim", 7.5)
WORDS = st.text(st.sampled_from("ab {}|$-1eE\\,:()[]n.w"), max_size=40)


def test_sizes_are_told_height_first_and_only_the_negative_prompts_have_their_own() -> None:
    sizes = SizeCondition(800, 600, original_width_negative=100, crop_top=3, crop_left=5)
    shared = replace(PLAIN, width=640, height=384, sizes=sizes)
    for copies, originals in (
        (1, [[600, 800]] * 2),
        (2, [[600, 100]] * 2 + [[600, 800]] * 2),
        (3, [[600, 100]] * 2 + [[600, 800]] * 4),
    ):
        told = geometry_of(shared, 2, copies, torch.device("cpu"))
        assert told.original_sizes_hw_B2.tolist() == originals
        assert told.crop_top_lefts_B2.tolist() == [[3, 5]] * 2 * copies
        assert told.target_sizes_hw_B2.tolist() == [[384, 640]] * 2 * copies
    plain = geometry_of(replace(shared, sizes=SizeCondition()), 1, 2, torch.device("cpu"))
    assert plain.original_sizes_hw_B2.tolist() == [[384, 640]] * 2
    assert plain.crop_top_lefts_B2.tolist() == [[0, 0]] * 2


def test_guidance_is_its_formula() -> None:
    negative, positive, empty = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert [Guidance(*of).copies for of in ((1.0,), (1.0, 2.0), (7.5,), (7.5, 0.0))] == [1, 1, 2, 3]
    assert torch.equal(Guidance(1.0).combine(positive), positive)
    guided = Guidance(7.5).combine(torch.cat([negative, positive]))
    torch.testing.assert_close(guided, negative + 7.5 * (positive - negative))
    apart = Guidance(7.5, 2.0).combine(torch.cat([negative, positive, empty]))
    torch.testing.assert_close(apart, empty + 7.5 * (positive - empty) - 2 * (negative - empty))


@given(st.text(max_size=80))
def test_any_line_is_read(line: str) -> None:
    try:
        parsed = parse_line(line)
    except UserError:
        return
    assert parsed.prompt == line.strip().split(" --")[0]


@given(WORDS, st.integers(1, 3))
def test_any_variants_are_drawn_or_refused(line: str, images: int) -> None:
    try:
        lines = expand(line, images, random.Random(1))
    except UserError:
        return
    assert lines
    assert lines == expand(line, images, random.Random(1))


@given(st.lists(st.text(st.sampled_from("abc "), min_size=1, max_size=4), min_size=1, max_size=5, unique=True))
def test_enumeration_gives_each_once(variants: list[str]) -> None:
    line = "{e$$" + "|".join(variants) + "} end"
    assert expand(line, 7, random.Random()) == [f"{variant} end" for variant in variants]


@given(st.text(st.sampled_from("xyz ,.("), max_size=30))
def test_text_without_braces_is_itself(text: str) -> None:
    assert expand(text, 3, random.Random()) == [text]


def test_too_many_combinations_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="more than 10000"):
        expand("{e$$a|b|c|d|e|f|g|h|i|j}" * 12, 1, random.Random())


# ---- seeds


def test_row_of_seeds_is_known() -> None:
    seeds = Seeds(42)
    assert [seeds.next() for _ in range(4)] == [2746317213, 1181241943, 958682846, 3163119785]
    assert Seeds(42, alone=True).next() == 42
    assert Seeds(None).next() != Seeds(None).next()


def test_seed_list_repeats_its_last() -> None:
    line = parse_line("x --d 1,2")
    assert [own_seed(line, index) for index in range(3)] == [1, 2, 2]
    assert own_seed(parse_line("x"), 0) is None


# ---- batches


def job(number: int, **changes: int) -> Job:
    return Job(number, "raw", "prompt", "", number, replace(PLAIN, **changes))


def test_neighbours_are_grouped() -> None:
    jobs = [job(0), job(1), job(2, steps=30), job(3)]
    assert [[one.number for one in batch] for batch in batches(jobs, 4)] == [[0, 1], [2], [3]]


@given(st.lists(st.integers(10, 12), max_size=20), st.integers(1, 5))
def test_batches_keep_order_and_key(steps: list[int], size: int) -> None:
    jobs = [job(number, steps=value) for number, value in enumerate(steps)]
    made = list(batches(jobs, size))
    assert [one for batch in made for one in batch] == jobs
    assert all(len(batch) <= size and len({one.shared for one in batch}) == 1 for batch in made)


def test_first_stage_sizes() -> None:
    big = replace(PLAIN, width=1000, height=520, sizes=SizeCondition(original_width=1000, crop_top=10))
    small = first_stage(Job(0, "", "", "", 1, big), 0.6, 28, 0.5, 32).shared
    assert (small.width, small.height, small.steps, small.strength) == (576, 288, 28, 0.5)
    assert (small.sizes.original_width, small.sizes.crop_top, small.sizes.crop_left) == (600, 6, None)
    near = first_stage(Job(0, "", "", "", 1, replace(big, width=533)), 0.6, 28, 0.5, 32).shared
    assert near.width == 320  # 319.8 pixels are 320, not less


def test_a_job_survives_its_json() -> None:
    import json

    shared = replace(
        PLAIN,
        multipliers=(0.5, -1.0),
        negative_scale=2.0,
        deep_shrink=DeepShrink(3, 650, None, 650, 0.5),
        gradual_latent=GradualLatent(750, 0.5, 0.125, 3, 1.0, (3.0, 0.5, 0.5, 1.0)),
    )
    whole = Job(3, "raw --s 1", "prompt", "no", 2**40, shared, "clip", "a.png", "m.png", ("g.png",))
    assert job_from_json(json.loads(json.dumps(asdict(whole)))) == whole
    plain = Job(0, "", "", "", 1, PLAIN)
    assert job_from_json(json.loads(json.dumps(asdict(plain)))) == plain
