"""Every line of the prompt file means what the comment above it says."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from library.generation.jobs import Defaults, Shared, defaults_of, settle
from library.generation.lines import parse_line
from library.generation.variants import expand
from library.log import UserError
from library.options.script import parse
from library.options.scripts import GEN_IMG

DATA = Path(__file__).parent / "data"
MARKED = re.compile(r"#(ABORT|AND|EMB) (?P<line>.*)")
TEXT = (DATA / "generation_prompts.txt").read_text(encoding="utf-8").splitlines()
PLAIN = [line.strip() for line in TEXT if line.strip() and not line.startswith("#")]
MARKED_LINES = {line: match["line"] for line in TEXT if (match := MARKED.match(line))}


def defaults(*more: str, networks: int = 0) -> Defaults:
    settings = parse(GEN_IMG, ["--prompt", "x", *more])
    return defaults_of(settings, 512, 8, [1.0] * networks)


def settled(line: str, *more: str, networks: int = 0) -> tuple[Shared, list[str]]:
    return settle(parse_line(line), defaults(*more, networks=networks))


def the(start: str) -> str:
    """The one line that begins so."""
    (found,) = [line for line in (*PLAIN, *MARKED_LINES.values()) if line.startswith(start)]
    return found


@pytest.mark.parametrize("line", PLAIN)
def test_every_line_is_drawn(line: str) -> None:
    for text in expand(line, 2, random.Random(0)):
        parsed = parse_line(text)
        assert parsed.prompt
        shared, _ = settle(parsed, defaults())
        assert (shared.width % 8, shared.height % 8) == (0, 0)


ABORTED = [line for marked, line in MARKED_LINES.items() if marked.startswith("#ABORT")]
MENDED = ("--w 500", "(pier:1.2.3)")  # a size is made to fit, a weight that is none is text


@pytest.mark.parametrize("line", [line for line in ABORTED if not any(word in line for word in MENDED)])
def test_what_stopped_the_old_program_is_one_clear_problem(line: str) -> None:
    with pytest.raises(UserError) as caught:
        settle(parse_line(expand(line, 1, random.Random(0))[0]), defaults())
    assert "\n" not in str(caught.value)


def test_what_can_be_mended_is_drawn() -> None:
    shared, notes = settled(next(line for line in ABORTED if MENDED[0] in line))
    assert (shared.width, shared.height) == (496, 512)
    assert len(notes) == 2
    assert settled(next(line for line in ABORTED if MENDED[1] in line))[1] == []


@pytest.mark.parametrize("case", json.loads((DATA / "dynamic_prompt_variants.json").read_text()), ids=str)
def test_variants_are_drawn_as_before(case: dict[str, object]) -> None:
    assert expand(str(case["prompt"]), 4, random.Random(case["seed"])) == case["n4"]


def test_sizes_steps_seeds_scale() -> None:
    assert settled(the("wide view of a desert"))[0] == settled("x --w 768 --h 512")[0]
    assert settled(the("tall waterfall"))[0].height == 768
    assert settled(the("a cube on a table"))[0].steps == 1000
    assert settled(the("a sphere on a table"))[0].steps == 1
    assert settled(the("a wooden chair"))[0].steps == 20
    assert settled(the("a wooden bench"))[0].steps == 20  # two blanks before the number, which the reference leaves out
    assert settled(the("a teapot"))[0].steps == 24
    assert parse_line(the("a glass marble")).options["seeds"] == (11, 12, 13, 14)
    assert settled(the("a foggy pine"))[0].scale == 1
    assert parse_line(the("a wooden table")).options["negative_prompt"] == "plastic "
    assert parse_line(the("--n this is prompt text")).prompt == "--n this is prompt text, not a negative prompt"
    everything = settled(the("(highly detailed"))[0]
    assert (everything.width, everything.height, everything.steps, everything.scale) == (896, 576, 32, 6.5)


def test_what_cannot_be_read_is_told_and_left() -> None:
    for start, word in {
        "a wooden shelf": "--quality",
        "a wooden door": "--l 7.5.1",
        "a wooden gate": "--d 1,,2",
        "a floating island": "--dst1 650.5",
    }.items():
        (note,) = parse_line(the(start)).notes
        assert word in note
    shared, _ = settled(the("a wooden door"))
    assert shared.scale == 7.5


def test_negative_scale_and_strength() -> None:
    assert settled(the("a knight in silver"))[0].negative_scale == 3.5
    assert settled(the("a knight in golden"), "--negative_scale", "2")[0].negative_scale is None
    assert settled("plain", "--negative_scale", "2")[0].negative_scale == 2
    assert settled(the("a watercolor version"))[0].strength == 0.55
    assert settled("plain")[0].strength == 0.8
    assert settled("plain", "--strength", "0.3")[0].strength == 0.3


def test_multipliers() -> None:
    assert settled(the("a cat sleeping"), networks=3)[0].multipliers == (0.7, 0.7, 0.7)
    assert settled(the("a dog wearing"), networks=3)[0].multipliers == (0.8, 0.5, 0.3)
    assert settled(the("a horse running"), networks=3)[0].multipliers == (-0.4, 0, 0)
    shared, notes = settled(the("a fox in the snow"), networks=2)
    assert shared.multipliers == (1.0, 0.9)
    assert "10 numbers for 2 networks" in notes[0]
    assert settled("x --am 0.5 --AM 0.7,-0.2", networks=3)[0].multipliers == (0.7, -0.2, -0.2)


def test_deep_shrink_belongs_to_its_line() -> None:
    shrink = settled(the("an endless library"))[0].deep_shrink
    assert shrink is not None
    assert (shrink.depth_1, shrink.timesteps_1, shrink.depth_2, shrink.timesteps_2, shrink.ratio) == (
        3,
        800,
        2,
        600,
        0.5,
    )
    by_ratio = settled(the("an underwater city"))[0].deep_shrink
    assert by_ratio is not None
    assert (by_ratio.depth_1, by_ratio.timesteps_1, by_ratio.ratio) == (3, 650, 0.4)
    assert settled(the("a quiet village"))[0].deep_shrink is None
    zero = settled("x --dsr 0.4", "--ds_depth_1", "0")[0].deep_shrink
    assert zero is not None
    assert zero.depth_1 == 0  # given, though it is 0
    assert settled("x --dsd1 none", "--ds_depth_1", "3")[0].deep_shrink is None


def test_gradual_latent_belongs_to_its_line() -> None:
    full = settled(the("a field of sunflowers"))[0].gradual_latent
    assert full is not None
    assert (full.timesteps, full.ratio, full.ratio_step, full.every_n_steps, full.s_noise) == (750, 0.5, 0.125, 3, 1.0)
    assert full.unsharp == (3, 0.5, 0.5, 1)
    three = settled(the("an old steam"))[0].gradual_latent
    assert three is not None
    assert three.unsharp == (3, 0.5, 0.5, 1)
    late = settled(the("a stone bridge"))[0].gradual_latent
    assert late is not None
    assert (late.timesteps, late.ratio, late.every_n_steps) == (650, 0.75, 2)
    assert settled("x --glt none", "--gradual_latent_timesteps", "700")[0].gradual_latent is None


def test_sdxl_sizes() -> None:
    sizes = settled(the("an art deco hotel"))[0].sizes
    assert (sizes.original_width, sizes.original_height) == (1664, 2432)
    assert (sizes.original_width_negative, sizes.original_height_negative) == (416, 608)
    assert (sizes.crop_top, sizes.crop_left) == (64, 32)


def test_variants_of_the_file() -> None:
    draw = lambda start, images=30: expand(the(start), images, random.Random(3))  # noqa: E731
    assert {line.split()[1] for line in draw("a {cat|dog|rabbit}")} == {"cat", "dog", "rabbit"}
    assert all(line.count(",") == 1 for line in draw("still life"))
    lines = draw("{e$$spring|autumn}")
    assert [line.split()[0] for line in lines] == ["spring"] * 3 + ["autumn"] * 3
    assert {parse_line(line).options["steps"] for line in draw("a {small|large}")} == {20, 28}
    last = set(draw("a {single} candle"))
    assert last == {f"a single candle, {{}} and {colour} light" for colour in ("red", "green", "blue")}


def test_sub_prompts() -> None:
    masked = ("--mask_path", "mask.png")
    assert settled(the("chara an astronaut"), *masked)[0].parts == 3
    assert settled("BRAND new", *masked)[0].parts == 1
