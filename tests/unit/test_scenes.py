"""The world of the built-in model: scenes, captions, and the reading of pictures that scores models."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.rng import stream
from library.scenes.drawing import draw
from library.scenes.making import placed, random_scene
from library.scenes.reading import MIXED, UNKNOWN, read
from library.scenes.scoring import (
    TAUGHT_COLOURS,
    TAUGHT_GROUNDS,
    TAUGHT_PLACES,
    TAUGHT_SHAPES,
    Question,
    Share,
    questions,
    shares,
    shows,
    subject_caption,
    subject_questions,
    subject_scenes,
)
from library.scenes.wording import caption
from library.scenes.world import (
    ALL_SHAPES,
    COLOURS,
    FREEHAND,
    PLACES,
    SHAPES,
    Figure,
    Scene,
    combinations,
    is_held_out,
)
from tools.make_scenes import main as make_scenes


def one(figure: Figure, ground: str, seed: int = 0, size: str = "medium", place: str = "centre") -> Scene:
    return Scene((placed(figure, stream(seed, "test"), size, place),), ground)  # pyright: ignore[reportArgumentType]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALL_SHAPES),
    st.permutations(list(COLOURS)),
    st.sampled_from(list(PLACES)),
    st.integers(0, 10_000),
)
def test_what_was_drawn_is_read(shape: str, colours: list[str], place: str, seed: int):
    scene = one(Figure(shape, colours[0]), colours[1], seed, "medium", place)
    answer = Question("", scene).answer(draw(scene, stream(seed, "shades")))
    assert all(answer.values()), (scene, answer)


def test_each_property_can_be_wrong():
    wanted = one(Figure("star", "red"), "white")
    question = Question("a red star on a white background", wanted)

    def wrong(scene: Scene) -> set[str]:
        return {name for name, right in question.answer(draw(scene, stream(0, "x"))).items() if not right}

    figure = wanted.figures[0]
    assert wrong(wanted) == set()
    assert wrong(replace(wanted, ground="blue")) == {"ground"}
    assert wrong(replace(wanted, figures=(replace(figure, colour="blue"),))) == {"colour"}
    assert wrong(replace(wanted, figures=(replace(figure, shape="cross"),))) == {"shape"}
    assert wrong(replace(wanted, figures=(replace(figure, centre=(0.72, 0.5)),))) == {"place"}
    assert wrong(replace(wanted, figures=(replace(figure, radius=0.14),))) == {"size"}
    two = (replace(figure, centre=(0.25, 0.3), radius=0.2), replace(figure, centre=(0.75, 0.7), radius=0.19))
    assert "count" in wrong(replace(wanted, figures=two))
    assert wrong(Scene((), "white")) == {"count", "colour", "shape", "place", "size"}


def test_a_blurred_picture_is_still_read():
    scene = one(Figure("heart", "green"), "yellow")
    picture = cv2.GaussianBlur(draw(scene, stream(0, "x")), (0, 0), 1.0)
    assert all(Question("", scene).answer(picture).values())


def test_noise_has_no_colour_and_scribble_no_shape():
    rng = np.random.default_rng(0)
    assert {figure.colour for figure in read(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).figures} == {MIXED}
    scribble = np.full((64, 64, 3), 255, np.uint8)
    cv2.polylines(scribble, [rng.integers(8, 56, (12, 1, 2)).astype(np.int32)], True, (215, 35, 40), 2)
    assert {figure.shape for figure in read(scribble).figures} == {UNKNOWN}


def test_training_scenes_never_show_what_is_asked_for():
    figures = [
        (figure, scene.ground)
        for index in range(3000)
        for scene in [random_scene(stream(1, "scene", index))]
        for figure in scene.figures
    ]
    assert {figure.shape for figure, _ in figures} == {*SHAPES, FREEHAND}
    shown = Counter((figure.shape, figure.colour, ground) for figure, ground in figures if figure.shape != FREEHAND)
    assert not any(is_held_out(*kind) for kind in shown)
    asked = {
        (question.scene.figures[0].shape, question.scene.figures[0].colour, question.scene.ground)
        for question in questions(200, stream(1, "questions"))
    }
    assert asked == set(combinations(held_out=True))
    words = {word for kind in asked for word in kind}
    assert words == {*SHAPES, *COLOURS}
    assert set(shown) <= set(combinations(held_out=False))
    assert len(shown) > 600


def test_figures_without_a_name_are_like_no_named_shape():
    scenes = (random_scene(stream(1, "scene", index)) for index in range(400))
    outlines = [scene.figures[0].outline for scene in scenes if scene.figures[0].outline is not None]
    assert len(set(outlines)) > 60
    for outline in outlines:
        scene = Scene((Figure(FREEHAND, "red", radius=0.45, outline=outline),), "white")
        (seen,) = read(draw(scene, stream(0, "shades"))).figures
        assert seen.overlap < 0.85
        assert seen.area > 0.15


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 100_000))
def test_every_figure_lies_within_the_picture(seed: int):
    (figure, *others) = random_scene(stream(seed, "scene")).figures
    for one_of_them in (figure, *others):
        assert all(one_of_them.radius <= middle <= 1 - one_of_them.radius for middle in one_of_them.centre)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 100_000))
def test_captions_name_what_is_there(seed: int):
    rng = stream(seed, "caption")
    scene = random_scene(rng)
    text = caption(scene, rng)
    for figure in scene.figures:
        assert figure.colour in text
        assert figure.shape in text
        assert figure.style == "flat" or figure.style in text
        assert figure.texture == "plain" or figure.texture in text
    assert f"{scene.ground} background" in text
    assert text.endswith("background") or " background with a" in text or " background with t" in text
    assert "  " not in text
    assert " a o" not in f" {text}"


def test_a_subject_is_asked_for_as_it_was_never_shown():
    taught = subject_scenes("house", 12, stream(1, "subject"))
    assert len({(scene.figures[0].colour, scene.ground) for scene in taught}) == 12
    for scene in taught:
        assert scene.figures[0].colour in TAUGHT_COLOURS
        assert scene.ground in TAUGHT_GROUNDS
        assert scene.figures[0].place in TAUGHT_PLACES
        assert shows(draw(scene, stream(0, "x")), "house")
    for question in subject_questions("house", "sks", 50, stream(1, "questions")):
        figure = question.scene.figures[0]
        assert figure.colour not in TAUGHT_COLOURS
        assert question.scene.ground not in TAUGHT_GROUNDS
        assert figure.place not in TAUGHT_PLACES
        assert "sks" in question.prompt
        assert "house" not in question.prompt
    with_word, without = (subject_questions("house", word, 20, stream(1, "questions")) for word in ("sks", ""))
    for named, wordless in zip(with_word, without, strict=True):
        assert wordless.scene == named.scene
        assert wordless.prompt == named.prompt.replace("sks", "shape")


def test_a_new_colour_is_taught_on_some_shapes_and_asked_for_on_others():
    taught = subject_scenes("turquoise", 12, stream(1, "subject"))
    assert {scene.figures[0].shape for scene in taught} <= set(TAUGHT_SHAPES)
    for scene in taught:
        assert shows(draw(scene, stream(0, "x")), "turquoise")
        assert "sks" in subject_caption(scene, "sks", stream(0, "words"))
    asked = subject_questions("turquoise", "sks", 50, stream(1, "questions"))
    for question in asked:
        (figure,) = question.scene.figures
        assert figure.shape not in TAUGHT_SHAPES
        assert figure.shape in question.prompt
        assert f"sks {figure.shape}" in question.prompt
        assert "turquoise" not in question.prompt
        answer = question.answer(draw(question.scene, stream(0, "shades")))
        assert all(answer.values())
    plain = questions(50, stream(1, "questions"))
    assert not any(shows(draw(question.scene, stream(0, "shades")), "turquoise") for question in plain)


def test_shares_have_wilsons_interval():
    # check value: Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, method 3
    low, high = Share(81, 263).interval
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)
    assert Share(0, 0).interval == (0.0, 1.0)
    found = shares([{name: name == "shape" for name in ("ground", "count", "colour", "shape", "place", "size")}] * 3)
    assert found["shape"] == Share(3, 3)
    assert found["colour"] == Share(0, 3)


def test_scenes_are_written_with_captions_and_again_the_same(tmp_path):
    for name in ("one", "two"):
        assert make_scenes(["--output_dir", str(tmp_path / name), "--count", "5", "--seed", "3"]) == 0
    for first in sorted((tmp_path / "one").iterdir()):
        assert first.read_bytes() == (tmp_path / "two" / first.name).read_bytes()
    assert len(list((tmp_path / "one").glob("*.png"))) == len(list((tmp_path / "one").glob("*.txt"))) == 5
    meta = tmp_path / "meta.json"
    assert make_scenes(["--output_dir", str(tmp_path / "three"), "--count", "5", "--out_json", str(meta)]) == 0
    texts = json.loads(meta.read_text("utf-8"))
    assert sorted(texts) == sorted(path.stem for path in (tmp_path / "three").glob("*.png"))
    assert not list((tmp_path / "three").glob("*.txt"))
    assert make_scenes(["--output_dir", str(tmp_path / "large"), "--count", "1", "--size_px", "96"]) == 0
    assert cv2.imread(str(tmp_path / "large" / "00000.png")).shape == (96, 96, 3)


def test_a_subject_is_written_under_its_word(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--count", "12", "--subject", "fish", "--subject_word", "zwx"]
    assert make_scenes(argv) == 0
    texts = [path.read_text("utf-8") for path in sorted(tmp_path.glob("*.txt"))]
    assert len(texts) == 12
    assert all("zwx" in text and "fish" not in text for text in texts)
