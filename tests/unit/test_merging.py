"""Texts of a folder gathered into a metadata file: the reference's form to the byte, and bad files passed over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.preparation import metadata
from library.preparation.files import find_images
from library.preparation.metadata import MetadataFile
from tests.house.source_map import ROOT
from tools.merge_captions_to_metadata import main as merge_captions
from tools.merge_dd_tags_to_metadata import main as merge_tags


def fill(folder: Path, **texts: str) -> Path:
    """An image for each name, with the text beside it; the suffix of the text follows two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        stem, _, extension = name.partition("__")
        (folder / f"{stem}.png").write_bytes(b"not looked at")
        if extension:
            (folder / f"{stem}.{extension}").write_text(text, encoding="utf-8")
    return folder


def test_the_form_of_the_file(tmp_path: Path):
    folder = fill(tmp_path / "in", b__caption="\ufeff a café\nsecond line \n", a__caption="A")
    assert merge_captions([str(folder), str(tmp_path / "out.json")]) == 0
    expected = '{\n  "a": {\n    "caption": "A"\n  },\n  "b": {\n    "caption": "a caf\\u00e9\\nsecond line"\n  }\n}'
    assert (tmp_path / "out.json").read_bytes() == expected.encode()


def test_tags_join_captions_and_unknown_fields_stay(tmp_path: Path):
    folder, out = fill(tmp_path / "in", a__txt="1girl, hat"), tmp_path / "out.json"
    out.write_text('{"a": {"caption": "C", "mine": 3}, "gone": {"caption": "D"}}')
    assert merge_tags([str(folder), str(out)]) == 0
    assert json.loads(out.read_text()) == {
        "a": {"caption": "C", "mine": 3, "tags": "1girl, hat"},
        "gone": {"caption": "D"},
    }
    assert merge_tags([str(folder), str(out), "--in_json", str(tmp_path / "no.json")]) == 1


def test_missing_and_unreadable_texts_are_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = fill(tmp_path / "in", a__caption="A", b="", c__caption="")
    (folder / "d.png").write_bytes(b"")
    (folder / "d.caption").write_bytes(b"\xff\xfe\xfa")
    out = tmp_path / "out.json"
    assert merge_captions([str(folder), str(out)]) == 0
    assert json.loads(out.read_text()) == {"a": {"caption": "A"}, "c": {"caption": ""}}
    assert "b.caption cannot be read" in caplog.text
    assert "d.caption is not UTF-8" in caplog.text


def test_nothing_at_all_is_an_error_and_writes_nothing(tmp_path: Path):
    folder, out = fill(tmp_path / "in", a="", b=""), tmp_path / "out.json"
    assert merge_captions([str(folder), str(out)]) == 1
    assert merge_captions([str(tmp_path / "nowhere"), str(out)]) == 1
    assert not out.exists()


def test_texts_with_another_ending_are_pointed_out_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    folder, out = fill(tmp_path / "in", a__txt="A", b__txt="B", c=""), tmp_path / "out.json"
    assert merge_captions([str(folder), str(out)]) == 1
    told = capsys.readouterr().err + caplog.text
    assert "2 have .txt" in told
    assert "--caption_extension .txt" in told
    assert "it is left out" not in told
    assert not out.exists()
    assert merge_captions([str(folder), str(out), "--caption_extension", ".txt"]) == 0
    assert list(json.loads(out.read_text())) == ["a", "b"]


def test_whole_paths_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "in", b__caption="B", a10__caption="ten", a2__caption="two")
    fill(tmp_path / "in" / "sub", a__caption="B")
    fill(tmp_path / "in" / ".hidden", a__caption="C")
    assert merge_captions(["in/", "out.json", "--recursive", "--full_path", "--caption_extention", "caption"]) == 0
    assert list(json.loads(Path("out.json").read_text())) == ["in/a2.png", "in/a10.png", "in/b.png", "in/sub/a.png"]
    assert merge_captions(["in", "other.json", "--recursive"]) == 1


def test_one_rule_for_images(tmp_path: Path):
    for name in ("a.PNG", "b.Jpg", ".hidden.png", "c.gif", "d.txt", "e.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in find_images(str(tmp_path))] == ["a.PNG", "b.Jpg", "e.webp"]


def test_saving_as_it_goes_costs_a_fixed_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[int] = []
    monkeypatch.setattr(metadata, "SAVE_EVERY", 10)
    monkeypatch.setattr(metadata, "atomic_write_text", lambda path, text: written.append(len(json.loads(text))))
    file = MetadataFile(str(tmp_path / "out.json"), {})
    for number in range(2000):
        file.set(str(number), "caption", "c")
        assert number + 1 - (written[-1] if written else 0) < max(10, (number + 1) / 9)  # what a kill would lose
    assert sum(written) < 12 * 2000  # entries written in all


def test_the_old_places_run_the_same_tools(tmp_path: Path):
    folder = fill(tmp_path / "in", a__caption="A")
    words = [sys.executable, str(ROOT / "finetune" / "merge_captions_to_metadata.py"), str(folder), "out.json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": {"caption": "A"}}
    for alias in (ROOT / "finetune").glob("*.py"):
        assert (ROOT / "tools" / alias.name).is_file()
        assert "runpy" in alias.read_text()
