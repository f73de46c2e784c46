"""Captions of image folders: which file is an image's, what is said where there is none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from library.data.records import BucketRules, CaptionRules, DatasetKind, DatasetSpec, ResolvedDataset, SubsetSpec
from library.data.sources import resolve
from library.data.spec import load_dataset_specs
from library.log import UserError
from library.options import DataOptions
from tests.data_fixtures import write_picture


def picture(path: Path) -> Path:
    return write_picture(path, (64, 48))


def folder(path: Path, **fields: Any) -> SubsetSpec:
    return SubsetSpec(image_dir=str(path), **{"class_tokens": "cat", **fields})


def found(subset: SubsetSpec, **choices: Any) -> ResolvedDataset:
    spec = DatasetSpec(DatasetKind.DREAMBOOTH, 1, BucketRules((64, 64)), (subset,))
    return resolve([spec], **choices)[0]


def problems(subset: SubsetSpec) -> list[str]:
    with pytest.raises(UserError) as caught:
        found(subset)
    return str(caught.value).split("\n")


def test_captions_by_extension(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.caption").write_text("from caption")
    (tmp_path / "a.txt").write_text("from txt")
    (tmp_path / "b.txt").write_text("\ufeff  first, line \r\nsecond\n", encoding="utf-8")
    by_itself = found(folder(tmp_path))
    assert [(r.caption, r.has_caption) for r in by_itself.records] == [
        ("from caption", True), ("first, line", True), ("cat", False),
    ]  # fmt: skip
    assert [r.caption_path for r in by_itself.records] == [str(tmp_path / "a.caption"), str(tmp_path / "b.txt"), None]
    only_txt = found(folder(tmp_path, caption_extension=".txt"))
    assert [r.caption for r in only_txt.records] == ["from txt", "first, line", "cat"]


def test_caption_without_the_face_suffix(tmp_path: Path) -> None:
    place = tmp_path / "a_b_c_d_e"
    picture(place / "girl_10_20_30_40.png")
    picture(place / "my_girl_1_2_3_4.png")
    (place / "girl.txt").write_text("short")
    (place / "my_girl.txt").write_text("other")
    (place / "my_girl_1_2_3_4.txt").write_text("own")
    assert [record.caption for record in found(folder(place)).records] == ["short", "own"]


def test_cut_and_missing_captions_are_told_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(8):
        picture(tmp_path / f"{number}.png")
    (tmp_path / "0.txt").write_text("one\ntwo")
    with caplog.at_level(logging.WARNING):
        data = found(folder(tmp_path, class_tokens=None))
    assert [record.caption for record in data.records] == ["one"] + [""] * 7
    assert "7 of 8 images have no caption: 1.png, 2.png, 3.png, 4.png, 5.png and 2 more" in caplog.text
    assert "1 files have more: 0.png" in caplog.text


def test_no_caption_anywhere_is_refused_unless_allowed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (line,) = problems(folder(tmp_path, class_tokens=None))
    assert "no image has a caption file (.caption or .txt)" in line
    assert "--allow_captionless" in line
    assert found(folder(tmp_path, class_tokens=None), allow_captionless=True).records[0].caption == ""
    place = tmp_path / "set" / "10_"
    place.mkdir(parents=True)
    picture(place / "a.png")
    options = DataOptions(train_data_dir=str(tmp_path / "set"), resolution=(64, 64))
    with pytest.raises(UserError, match="no image has a caption file"):
        resolve(load_dataset_specs(options, frozenset({DatasetKind.DREAMBOOTH})))
    (tmp_path / "a.txt").write_text("x")
    (line,) = problems(folder(tmp_path, class_tokens=None, caption_extension=".caption"))
    assert "there are 1 .txt files: set caption_extension" in line


def test_captions_of_an_unusual_ending_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Class tokens may be all that is wanted, so it is no error; without them it is one, and it tells the ending."""
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.tags").write_text("一匹の犬", encoding="utf-8")
    (line,) = problems(folder(tmp_path, class_tokens=None))
    assert "there is a .tags file for each image: set caption_extension" in line
    found(folder(tmp_path))
    (told,) = [line for line in caplog.messages if ".tags" in line]
    assert "set caption_extension to .tags" in told
    assert [record.caption for record in found(folder(tmp_path, caption_extension=".tags")).records] == ["一匹の犬"] * 2
    caplog.clear()
    found(folder(tmp_path), allow_captionless=True)
    (tmp_path / "b.tags").unlink()
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text("{}")
        (tmp_path / f"{name}.raw").write_bytes(b"x\0y")
    found(folder(tmp_path))
    assert not [line for line in caplog.messages if "caption_extension" in line]


def test_braces_that_are_no_choice_are_told_with_wildcards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "choice": "a {cat|dog} {x}", "plain": "a {{cat}}", "both": "{{ {a|b} }}", "nested": "a {cat|{big|small} dog}",
        "open": "{cat|dog", "closed": "cat|dog}", "empty": "a {} cat", "none": "cat",
    }  # fmt: skip
    for name, text in texts.items():
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    with caplog.at_level(logging.WARNING):
        found(folder(tmp_path))
        assert not caplog.records
        found(folder(tmp_path, captions=CaptionRules(enable_wildcard=True)))
    (told,) = caplog.messages
    assert told.endswith("trained as text: closed.png, empty.png, nested.png, open.png")
