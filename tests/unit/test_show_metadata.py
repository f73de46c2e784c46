"""Showing and editing metadata: the tensors stay byte for byte, the hashes fit the new file."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.checkpoint.hashes import network_hashes
from library.checkpoint.io import read_header, save_safetensors
from tests.house.source_map import ROOT
from tools.show_metadata import main

METADATA = {
    "ss_network_dim": "4",
    "ss_datasets": '[{"images": 3}]',
    "ss_training_comment": "käse",
    "modelspec.title": "x",
    "format": "pt",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Longer than the window of the legacy hash; the data are not in the order that a new file would have."""
    path = tmp_path / "lora.safetensors"
    tensors = {"a.lora_down.weight": torch.randn(700_000).half(), "a.alpha": torch.tensor(4.0)}
    save_safetensors(path, tensors, network_hashes(tensors, METADATA))
    return path


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 + length :]


def run(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0


def test_shows_sorted_json_with_nested_json_as_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", file)
    text = capsys.readouterr().out
    shown = json.loads(text)
    assert shown == read_header(file)[1]
    assert shown["ss_datasets"] == '[{"images": 3}]'
    assert text.splitlines()[1].startswith('    "')
    assert list(shown) == sorted(shown)


def test_parsed_unfolds_nested_json_only(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", file, "--parsed")
    shown = json.loads(capsys.readouterr().out)
    assert shown["ss_datasets"] == [{"images": 3}]
    assert shown["ss_network_dim"] == "4"


@pytest.mark.parametrize("in_place", [True, False])
def test_edits_leave_tensors_and_mend_hashes(file: Path, tmp_path: Path, in_place: bool) -> None:
    before, data = read_header(file)[1], data_of(file)
    target = file if in_place else tmp_path / "new" / "edited.safetensors"
    edits = ["--set", "ss_training_comment=a b = c", "note=" + "long" * 500, "--remove", "ss_datasets"]
    run("--model", file, *edits, *([] if in_place else ["--save_to", target]))
    after = read_header(target)[1]
    assert data_of(target) == data
    assert after["ss_training_comment"] == "a b = c"
    assert after["note"] == "long" * 500
    assert "ss_datasets" not in after
    assert after["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert after["sshs_legacy_hash"] == hashlib.sha256(target.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert after["sshs_legacy_hash"] != before["sshs_legacy_hash"]  # the header grew
    if not in_place:
        assert read_header(file)[1] == before
    with safe_open(str(target), "pt") as opened:
        assert opened.metadata() == after
        assert set(opened.keys()) == {"a.lora_down.weight", "a.alpha"}
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


def test_wrong_hashes_are_made_right(tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    save_safetensors(path, {"a.alpha": torch.tensor(1.0)}, {"sshs_model_hash": "0" * 64})
    run("--model", path, "--set", "a=b")
    assert read_header(path)[1]["sshs_model_hash"] == hashlib.sha256(data_of(path)).hexdigest()


def test_a_file_of_another_program_keeps_its_order(tmp_path: Path) -> None:
    """Offsets in the header count from the data's start: rows stay as they are, without hashes that were not there."""
    path = tmp_path / "odd.safetensors"
    rows = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
    }
    header = json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes([7, 8, 9]))
    run("--model", path, "--set", "k=v")
    with safe_open(str(path), "pt") as opened:
        assert opened.get_tensor("a").tolist() == [8, 9]
        assert opened.metadata() == {"k": "v"}


def test_strip_keeps_what_no_metadata_keeps(
    file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run("--model", file, "--strip")
    assert set(read_header(file)[1]) == {
        "ss_network_dim",
        "modelspec.title",
        "format",
        "sshs_model_hash",
        "sshs_legacy_hash",
    }
    assert "ss_datasets, ss_training_comment" in capsys.readouterr().err + caplog.text


def test_from_json_takes_back_what_was_shown(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_header(file)[1]
    run("--model", file, "--parsed")
    (tmp_path / "m.json").write_text(capsys.readouterr().out, "utf-8")
    run("--model", file, "--remove", *(key for key in before if not key.startswith("sshs_")))
    assert set(read_header(file)[1]) == {"sshs_model_hash", "sshs_legacy_hash"}
    run("--model", file, "--from_json", tmp_path / "m.json")
    assert read_header(file)[1] == before


def test_mistakes_are_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = file.read_bytes()
    pickle = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1)}, pickle)
    (tmp_path / "list.json").write_text("[1]")
    for words, expected in (
        (["--model", str(file), "--remove", "nothing"], "--remove nothing"),
        (["--model", str(pickle)], "no safetensors file"),
        (["--model", str(tmp_path / "absent")], "there is no file"),
        (["--model", str(file), "--from_json", str(tmp_path / "list.json")], "must hold an object"),
        (["--model", str(file), "--set", "novalue"], "novalue"),
        (["--set", "a=b"], "--model is missing"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert file.read_bytes() == content


def test_help_imports_no_torch() -> None:
    code = """
import sys, tools.show_metadata as tool
try:
    tool.main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "--from_json" in done.stdout
    assert done.stdout.endswith("\nFalse\n")
