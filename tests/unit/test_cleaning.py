"""Cleaning captions and tags: the vectors of the original rules, and where ours are better."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.preparation.cleaning import clean_caption, clean_tags
from tools.clean_captions_and_tags import main

ALIKE = [
    (
        "2girls, long_hair, short_hair, blue_eyes, red_eyes, blonde_hair, multiple_girls",
        "2girls, blonde hair, multiple girls",
    ),
    ("2girls, long hair, blonde hair, pink hair, ponytail, braid", "2girls, long hair"),
    ("boys, single braid, twin braids, ponytail", "boys, twin braids"),
    ("2girls, light blue hair, red hair", "2girls, light blue hair, red hair"),
    ("shirt, white shirt, hair ornament, flower hair ornament", "white shirt, flower hair ornament"),
    ("shirt, t-shirt", "shirt, t-shirt"),
    ("dress, very long dress, long dress", "very long dress, long dress"),
    ("^_^, a_b", "^_^, a b"),
    ("1girl, long_hair, short_hair, rating:safe", "1girl, long hair, short hair"),
    ("2girls, bob cut, hime cut, sleeveless, long sleeves", "2girls"),
    ("2girls, long hair, short hair, medium hair, red hair, blue hair", "2girls"),
]
CAPTIONS_ALIKE = [
    ("a cartoon anime drawing of a young woman", "a drawing of a girl"),
    ("an anime cartoon image of people", "an image of girls"),
    ("a woman and a young lady", "a girl and a girl"),
    ("anime anime anime girl", "girl"),
    ("a cartoon girl with cartoon women", "a girl with girls"),
]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("before", "after"), ALIKE)
def test_tags_where_both_rules_agree(before: str, after: str, legacy: bool):
    assert clean_tags(before, legacy) == after


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("before", "after"), CAPTIONS_ALIKE)
def test_captions_where_both_rules_agree(before: str, after: str, legacy: bool):
    assert clean_caption(before, legacy) == after


@pytest.mark.parametrize(
    ("before", "legacy", "ours"),
    [
        ("1girl, long_hair, rating:safe, foo", "1girl, long hair", "1girl, long hair, foo"),
        ("rating:safe, 1girl", "rating:safe, 1girl", "1girl"),
        ("shirt,white shirt", "shirt,white shirt", "white shirt"),
        ("2girls,blue eyes,red eyes,hat", "2girls,blue eyes,red eyes,hat", "2girls, hat"),
    ],
)
def test_tags_where_the_rules_differ(before: str, legacy: str, ours: str):
    assert (clean_tags(before, legacy=True), clean_tags(before)) == (legacy, ours)


@pytest.mark.parametrize(
    ("before", "legacy", "ours"),
    [
        ("personal female lady", "girlal girl", "personal girl"),
        ("a gentlewoman of the womens' club", "a gentlegirl of the girlss' club", None),
        ("townspeople", "townsgirls", "townspeople"),
    ],
)
def test_captions_keep_whole_words(before: str, legacy: str, ours: str | None):
    assert clean_caption(before, legacy=True) == legacy
    assert clean_caption(before) == (ours or before)


tags_of_words = st.lists(st.sampled_from(["1girl", "2girls", "blue hair", "red hair", "hat", "red hat", "^_^", "a-b"]))


@given(tags_of_words)
def test_cleaning_twice_changes_nothing_and_adds_nothing(tags: list[str]):
    once = clean_tags(", ".join(tags))
    assert clean_tags(once) == once
    assert set(once.split(", ")) - {""} <= set(tags)


ENTRIES = {
    "a": {"tags": "shirt, white_shirt", "caption": "a young woman", "train_resolution": [64, 64]},
    "b": {"tags": "1girl, rating:safe, hat"},
    "c": {"other": 1},
}


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "in.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def test_a_file_is_cleaned_and_the_rest_is_kept(metadata: Path, tmp_path: Path):
    target = tmp_path / "out.json"
    assert main([str(metadata), str(target)]) == 0
    assert json.loads(target.read_text()) == {
        "a": {"tags": "white shirt", "caption": "a girl", "train_resolution": [64, 64]},
        "b": {"tags": "1girl, hat"},
        "c": {"other": 1},
    }


def test_three_words_of_old_command_lines(metadata: Path, tmp_path: Path):
    target = tmp_path / "out.json"
    assert main(["photos", str(metadata), str(target), "--legacy_rules"]) == 0
    assert json.loads(target.read_text())["b"] == {"tags": "1girl"}


def test_a_dry_run_shows_changes_and_writes_nothing(metadata: Path, caplog: pytest.LogCaptureFixture):
    before = metadata.read_bytes()
    with caplog.at_level(logging.INFO):
        assert main([str(metadata), "--dry_run"]) == 0
    assert metadata.read_bytes() == before
    assert "before: 1girl, rating:safe, hat\n  after:  1girl, hat" in caplog.text
    assert "3 texts would change" in caplog.text


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}'])
def test_files_that_are_no_metadata(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "in.json"
    path.write_text(text)
    assert main([str(path), str(tmp_path / "out.json")]) == 1
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
