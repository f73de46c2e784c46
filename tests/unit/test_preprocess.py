"""Preprocessors of guide pictures, and the tool that draws edges."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.generation.preprocess import PREPROCESSORS, make_preprocessor
from library.log import UserError
from tests.control_fixtures import guide_picture
from tools.canny import main as canny_tool


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return guide_picture(tmp_path / "photo.png", size=(90, 70))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def edges(path: Path, low: float, high: float) -> np.ndarray:
    gray = cv2.cvtColor(pixels(path), cv2.COLOR_RGB2GRAY)
    return np.stack([cv2.Canny(gray, low, high)] * 3, axis=2)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("canny", 63, 191), ("canny_20_60", 20, 60), ("Canny_100", 100, 191)]
)
def test_canny_is_opencvs_in_three_channels(photo: Path, name: str, low: int, high: int) -> None:
    found = make_preprocessor(name)(pixels(photo))
    assert np.array_equal(found, edges(photo, low, high))
    assert 0 < found.mean() < 128


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_every_kind_gives_a_picture_of_the_same_size(photo: Path, name: str) -> None:
    given = pixels(photo)
    before = given.copy()
    found = make_preprocessor(name)(given)
    assert (found.shape, found.dtype) == (given.shape, np.uint8)
    assert np.array_equal(given, before)
    assert np.array_equal(found, given) == (name == "none")


def test_kinds_do_what_their_names_say() -> None:
    dark_line = np.full((40, 40, 3), 200, np.uint8)
    dark_line[:, 19:21] = 20
    lines = make_preprocessor("lineart")(dark_line)
    assert lines[20, 19].min() > 200
    assert lines[:, :10].max() == 0
    assert (make_preprocessor("scribble")(dark_line)[20, 17:23] == 255).all()
    assert np.array_equal(make_preprocessor("invert")(dark_line), 255 - dark_line)
    assert set(np.unique(make_preprocessor("threshold_100")(dark_line))) == {0, 255}
    assert make_preprocessor("threshold_230")(dark_line).max() == 0
    assert make_preprocessor("tile_40")(dark_line).std() < 5
    assert make_preprocessor("blur_1")(dark_line).std() > make_preprocessor("blur_9")(dark_line).std()


@pytest.mark.parametrize("name", ["kanny", "canny_1_2_3", "canny_a", "invert_1", "tile_0", "blur_nan", "canny_-1", ""])
def test_unknown_names_and_numbers_are_errors(name: str) -> None:
    with pytest.raises(UserError, match="--control_net_preps"):
        make_preprocessor(name)


def test_tool_writes_edges(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "edges.png"
    assert canny_tool(["--input", str(photo), "--output", str(target)]) == 0
    assert np.array_equal(pixels(target), edges(photo, 32, 224))
    assert canny_tool(["--input", str(photo), "--output", str(target), "--thres1", "5", "--thres2", "10"]) == 0
    assert np.array_equal(pixels(target), edges(photo, 5, 10))
    assert canny_tool(["--input", str(tmp_path / "no.png"), "--output", str(target)]) == 1
    assert canny_tool(["--input", str(photo), "--output", str(tmp_path / "edges")]) == 1
    assert "no.png" in capsys.readouterr().err


def test_tool_writes_the_edges_of_a_folder(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "images", tmp_path / "new" / "edges"
    source.mkdir()
    assert canny_tool(["--input", str(source), "--output", str(target)]) == 1
    assert "no images in the folder" in capsys.readouterr().err
    for name in ("a.JPG", "b.png"):
        with Image.open(photo) as picture:
            picture.convert("RGB").save(source / name)
    (source / "a.txt").write_text("a caption")
    assert canny_tool(["--input", str(source), "--output", str(source)]) == 1
    assert "must be another folder" in capsys.readouterr().err
    assert canny_tool(["--input", str(source), "--output", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.png"]
    assert np.array_equal(pixels(target / "b.png"), edges(source / "b.png", 32, 224))
