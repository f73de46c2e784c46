"""Smaller copies, faces and edges: the arithmetic, and folders with bad files in them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.face_names import FaceBox, face_box
from library.log import UserError
from library.options.preparation import FaceOptions
from library.options.preparation_scripts import DETECT_FACES
from library.options.script import parse
from library.preparation.faces import CutRules, Face, cut_out, eye_angle, plan_cut, result_name
from library.preparation.faces_run import cut_faces, face_of
from library.preparation.resizing import Reduction, reduction
from tests.data_fixtures import picture, write_picture
from tools.canny import main as canny
from tools.detect_face_rotate import main as detect_faces
from tools.resize_images_to_resolution import main as resize

# ---- smaller copies

sides = st.integers(1, 4000)


@given(sides, sides, sides, sides, st.integers(1, 8))
def test_a_reduction_bounds_the_area_and_rounds_the_sides(width: int, height: int, w: int, h: int, step: int):
    try:
        plan = reduction((width, height), (w, h), step)
    except ValueError:
        return
    assert plan.scaled[0] * plan.scaled[1] <= max(w * h, 0) or plan.scaled == (width, height)
    assert all(cut % step == 0 and 0 <= whole - cut < step for whole, cut in zip(plan.scaled, plan.cut, strict=True))


@pytest.mark.parametrize(
    ("size", "most", "step", "plan"),
    [
        ((1000, 500), (512, 512), 1, Reduction((724, 362), (724, 362))),
        ((1000, 500), (512, 512), 8, Reduction((724, 362), (720, 360))),
        ((300, 200), (512, 512), 64, Reduction((300, 200), (256, 192))),
    ],
)
def test_reductions(size, most, step, plan):
    assert reduction(size, most, step) == plan


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    write_picture(folder / "a[1].PNG", (80, 40), 1)
    write_picture(folder / "b.jpg", (30, 30), 2)
    (folder / "a[1].txt").write_text("caption")
    (folder / "notes.txt").write_text("notes")
    (folder / "bad.png").write_bytes(b"")
    (folder / "sub").mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_size_is_made_from_the_original(photos: Path, tmp_path: Path):
    """The order of the sizes must not matter, and a small one must not spoil a large one."""
    for out, order in (("one", "32x32,16x16"), ("two", "16x16,32x32")):
        words = [str(photos), str(tmp_path / out), "--max_resolution", order, "--save_as_png"]
        assert resize([*words, "--copy_associated_files"]) == 0
    assert names(tmp_path / "one") == [
        "a[1]+16x16.png", "a[1]+16x16.txt", "a[1]+32x32.png", "a[1]+32x32.txt", "b+16x16.png", "b+32x32.png",
        "notes.txt",
    ]  # fmt: skip
    assert names(tmp_path / "two") == names(tmp_path / "one")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with Image.open(tmp_path / "one" / "a[1]+32x32.png") as image:
        assert image.size == (45, 22)


def test_pictures_that_differ_in_their_suffix_only_have_results_each(photos: Path, tmp_path: Path):
    write_picture(photos / "b.png", (40, 20), 3)
    (photos / "b.txt").write_text("caption")
    words = ["--max_resolution", "16x16", "--copy_associated_files"]
    assert resize([str(photos), str(tmp_path / "out"), *words]) == 0
    expected = ["b.jpg+16x16.jpg", "b.jpg+16x16.txt", "b.png+16x16.jpg", "b.png+16x16.txt"]
    assert [name for name in names(tmp_path / "out") if name.startswith("b")] == expected
    with Image.open(tmp_path / "out" / "b.png+16x16.jpg") as wide, Image.open(tmp_path / "out" / expected[0]) as square:
        assert (wide.size, square.size) == ((22, 11), (16, 16))


def test_a_copy_that_is_cut_short_does_not_stay(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def cut_short(source: Path, target: Path) -> None:
        Path(target).write_bytes(source.read_bytes()[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", cut_short)
    assert resize([str(photos), str(tmp_path / "out"), "--max_resolution", "16x16"]) == 1
    assert names(tmp_path / "out") == ["a[1]+16x16.jpg", "b+16x16.jpg"]


def test_the_interpolation_is_the_one_asked_for(photos: Path, tmp_path: Path):
    made: set[bytes] = set()
    for how in ("area", "cubic", "lanczos4"):
        words = [str(photos), str(tmp_path / how), "--max_resolution", "20x20", "--save_as_png", "--interpolation", how]
        assert resize(words) == 0
        made.add((tmp_path / how / "b+20x20.png").read_bytes())
    assert len(made) == 3


def test_resizing_without_companions_and_bad_targets(photos: Path, tmp_path: Path):
    assert resize([str(photos), str(tmp_path / "out"), "--max_resolution", "16x16", "--divisible_by", "8"]) == 0
    assert names(tmp_path / "out") == ["a[1]+16x16.jpg", "a[1].txt", "b+16x16.jpg", "notes.txt"]
    with Image.open(tmp_path / "out" / "a[1]+16x16.jpg") as image:
        assert image.size == (16, 8)
    assert resize([str(photos), str(photos)]) == 1
    assert resize([str(photos), str(tmp_path / "x"), "--max_resolution", "16"]) == 1
    assert resize([str(photos), str(tmp_path / "x"), "--divisible_by", "999"]) == 1


# ---- faces

FACE = Face((60, 30), (20, 16), 10.0)


@given(
    st.tuples(st.integers(8, 900), st.integers(8, 900)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.floats(2, 300),
    st.sampled_from(
        [
            CutRules(crop_size=(64, 48)),
            CutRules(crop_size=(64, 48), resize_fit=True),
            CutRules(crop_size=(64, 48), resize_face_size=30),
            CutRules(crop_ratio=(2.0, 3.0)),
            CutRules(),
            CutRules(resize_face_size=30),
        ]
    ),
)
def test_a_cut_lies_in_the_picture_and_keeps_the_face(size, place, side, rules):
    face = Face((place[0] * size[0], place[1] * size[1]), (side, side))
    cut = plan_cut(size, face, rules)
    for axis in (0, 1):
        assert 0 <= cut.left_top[axis] <= cut.scaled[axis] - cut.size[axis]
        assert -1 <= cut.face.center[axis] <= cut.size[axis] + 1
    if rules.crop_size:
        assert cut.size == rules.crop_size
    if rules.resize_fit:
        assert cut.scaled[0] == cut.size[0] or cut.scaled[1] == cut.size[1]
    if rules.resize_face_size and not cut.enlarged_over_face_size:
        assert cut.face.side == pytest.approx(30)


def test_cuts_by_hand():
    assert plan_cut((100, 100), FACE, CutRules(crop_size=(40, 40))).left_top == (40, 10)
    assert plan_cut((100, 100), FACE, CutRules(crop_ratio=(2, 1))).size == (40, 20)
    assert plan_cut((20, 50), Face((10, 10), (4, 4)), CutRules(crop_size=(40, 40))).scaled == (40, 100)
    over = plan_cut((100, 100), FACE, CutRules(crop_size=(90, 90), resize_face_size=10))
    assert over.enlarged_over_face_size
    assert over.scaled == (90, 90)


def test_turning_makes_the_eyes_level():
    pixels = np.zeros((101, 101, 3), np.uint8)
    face = Face((50, 50), (40, 40), eye_angle((30, 40), (70, 60)))
    for x, y in ((30, 40), (70, 60)):
        pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
    result, _ = cut_out(pixels, face, CutRules(rotate=True))
    rows, columns = np.nonzero(result[:, :, 0] > 100)
    half = math.hypot(20, 10)
    assert set(rows) <= {49, 50, 51}
    assert (columns.min(), columns.max()) == (pytest.approx(50 - half, abs=2), pytest.approx(50 + half, abs=2))


def test_names_are_those_that_training_reads():
    name = result_name("a_b", FACE, None)
    assert name == "a_b_0060_0030_0020_0016"
    assert face_box(f"x/{name}.png") == FaceBox((60, 30), (20, 16))
    assert result_name("a", FACE, 2) == "a_02_0060_0030_0020_0016"


def test_the_packages_answer():
    points = [[0.0, 0.0, 1.0]] * 28
    points[11], points[19] = [10.0, 20.0, 1.0], [20.0, 20.0, 1.0]
    assert face_of([10, 10, 30, 50, 0.95], points) == Face((20, 30), (20, 40), 0.0)


def faces_options(folder: Path, **more: object) -> FaceOptions:
    return FaceOptions(src_dir=str(folder), dst_dir=str(folder.parent / "out"), **more)  # type: ignore[arg-type]


def test_several_faces_are_each_cut_from_the_untouched_picture(photos: Path):
    """A picture whose size changes for the first face must not change the second one's."""
    small, large = Face((70, 30), (10, 10)), Face((20, 20), (20, 20))

    def detect(pixels: np.ndarray) -> list[Face]:
        return [small, large] if pixels.shape == (40, 80, 3) else []

    outcome = cut_faces(faces_options(photos, crop_ratio=(1.0, 1.0), multiple_faces=True), detect)
    assert (outcome.done, outcome.skipped, len(outcome.failures)) == (1, 1, 1)
    assert names(photos.parent / "out") == ["a[1]_01_0010_0010_0020_0020.png", "a[1]_02_0005_0005_0010_0010.png"]
    whole = picture((80, 40), 1)
    with Image.open(photos.parent / "out" / "a[1]_02_0005_0005_0010_0010.png") as image:
        assert np.array_equal(np.asarray(image), whole[25:35, 65:75])


def test_faces_whose_results_would_have_one_name_are_numbered(photos: Path):
    """Cuts of one size around faces of one size tell the same place."""

    def detect(pixels: np.ndarray) -> list[Face]:
        return [Face((20, 20), (10, 10)), Face((60, 20), (10, 10))] if pixels.shape == (40, 80, 3) else []

    for _ in range(2):  # the second run writes the same files
        assert cut_faces(faces_options(photos, crop_size=(20, 20)), detect).done == 1
    assert names(photos.parent / "out") == ["a[1]_0010_0010_0010_0010.png", "a[1]_02_0010_0010_0010_0010.png"]
    whole = picture((80, 40), 1)
    for name, left in zip(names(photos.parent / "out"), (10, 50), strict=True):
        with Image.open(photos.parent / "out" / name) as image:
            assert np.array_equal(np.asarray(image), whole[10:30, left : left + 20])


def test_faces_of_unwanted_sizes_are_passed_over(photos: Path):
    faces = [Face((20, 20), (side, side)) for side in (5, 10, 20)]
    outcome = cut_faces(faces_options(photos, min_size=10, max_size=20, debug=True), lambda pixels: faces)
    assert outcome.done == 2
    assert all("_0010_0010" in name for name in names(photos.parent / "out"))


@pytest.mark.parametrize(
    "wrong",
    [
        "--crop_ratio 1,1 --resize_face_size 9",
        "--crop_ratio 1,1 --crop_size 9,9",
        "--resize_fit",
        "--resize_fit --resize_face_size 9 --crop_size 9,9",
    ],
)
def test_options_of_faces_that_contradict(wrong: str):
    with pytest.raises(UserError, match=r"exclude|needs"):
        parse(DETECT_FACES, ["--src_dir", "in", "--dst_dir", "out", *wrong.split()])


def test_a_missing_detector_is_one_line(photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "anime_face_detector", None)
    assert detect_faces(["--src_dir", str(photos), "--dst_dir", str(photos / "out")]) == 1
    assert "pip install anime-face-detector" in capsys.readouterr().err


# ---- edges


def test_edges_of_a_folder(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_picture(photos / "b.png", (30, 30))
    assert canny(["--input", str(photos), "--output", str(tmp_path / "out")]) == 0
    assert names(tmp_path / "out") == ["a[1].png", "b.jpg.png", "b.png.png"]
    assert "bad.png" in caplog.text
    assert canny(["--input", str(photos), "--output", str(photos)]) == 1
