"""Names that are no UTF-8 text, as archives packed on other systems leave them: bytes to the file system, to us text
with lone surrogates. They are names like any other.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from library.checkpoint.io import atomic_write_json
from library.command import run_command
from library.data import index
from library.data.dataset import TrainImages
from library.data.debug_sheet import write_debug_sheets
from library.data.plan import plan_epoch
from library.data.records import BucketRules, CaptionClock, DatasetKind, DatasetSpec, ResolvedDataset, SubsetSpec
from library.data.sources import resolve
from library.log import UserError
from library.options.preparation_scripts import CANNY
from library.rng import seed_of
from tests.data_fixtures import write_picture
from tools.check_dataset import main as check_dataset

NAME = "caf\udce9"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    try:
        os.rename(write_picture(place / "a.png", (64, 64)), place / f"{NAME}.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes text only")
    (place / f"{NAME}.txt").write_text("a cup")
    return place


def resolved(folder: Path, class_tokens: str | None = None) -> tuple[ResolvedDataset, ...]:
    subset = SubsetSpec(image_dir=str(folder), class_tokens=class_tokens)
    return resolve([DatasetSpec(DatasetKind.DREAMBOOTH, 1, BucketRules((64, 64)), (subset,))])


def test_images_are_trained_on_and_shown(folder: Path, tmp_path: Path) -> None:
    data = resolved(folder)
    images, plan, clock = TrainImages(data, None, 7), plan_epoch(data, 7, 1, 1, 1), CaptionClock(1, 0, 1)
    assert images.load(plan[0].micro_batches[0], 0, 1, clock).captions == ("a cup",)
    *_, captions = write_debug_sheets(images, plan, tmp_path / "out", clock)
    assert "caf\\udce9.png" in captions.read_text("utf-8")


def test_the_memory_of_a_folder_holds_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_WORTH_REMEMBERING", 1)
    first = index.read_folder(str(folder), (".txt",))
    monkeypatch.setattr(index, "measure", lambda path: pytest.fail(f"{path} was opened again"))
    assert index.read_folder(str(folder), (".txt",)) == first


def test_a_page_about_them(folder: Path, tmp_path: Path) -> None:
    assert check_dataset([str(folder), "--html", str(tmp_path / "page.html")]) == 0
    assert "caf\\udce9.png" in (tmp_path / "page.html").read_text("utf-8")


def test_a_name_that_is_to_be_a_caption_is_refused(folder: Path) -> None:
    (folder / f"{NAME}.txt").unlink()
    with pytest.raises(UserError, match="not UTF-8 text and is to be a caption"):
        resolved(folder, class_tokens=NAME)


def test_json_reads_them_back(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", {"é": NAME})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"é": NAME}


def test_their_draws_are_their_own() -> None:
    assert seed_of(1, NAME) != seed_of(1, "caf\udcea")


def test_an_output_that_cannot_show_a_name_shows_its_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", errors="strict", write_through=True))
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert run_command(CANNY, lambda settings: print(f"{NAME} é") or 0, words) == 0
    assert shown.getvalue() == b"caf\\udce9 \\xe9" + os.linesep.encode()
