"""The walk of docs/data_preparation.md: every command, in its order, in a folder with photos and toy models."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from library.preparation import faces_run, tagging_run
from library.preparation.faces import Face
from library.training.app import run
from tests.captioner_fixtures import write_blip, write_git
from tests.house.source_map import ROOT
from tests.toy import write_toy_checkpoint
from tests.training.runs import SCRIPT
from tests.unit.test_tagging import TABLE, FakeSession

DOCUMENT = ROOT / "docs" / "data_preparation.md"
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Added for speed: small sizes, few steps.
QUICK = {
    "prepare_buckets_latents.py": "--max_resolution 64,64 --min_bucket_reso 32 --bucket_reso_steps 8",
    "train_network.py": "--max_train_epochs 1 --network_dim 2 --output_name toy --learning_rate 1e-3 --seed 1",
    "make_captions.py": "--max_length 12",
    "make_captions_by_git.py": "--max_length 12",
}


def commands() -> list[list[str]]:
    text = DOCUMENT.read_text("utf-8")
    return [shlex.split(line) for block in BLOCK.findall(text) for line in block.splitlines()]


def test_the_document_shows_every_tool():
    shown = {Path(words[1]).name for words in commands()}
    named = {path.name for path in (ROOT / "finetune").glob("*.py")} | {"check_dataset.py", "canny.py"}
    assert named | {"detect_face_rotate.py", "resize_images_to_resolution.py", "train_network.py"} == shown


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Runs a command of the document in a folder that has all that it names."""
    shutil.copytree(ROOT / "examples" / "photos" / "subjects" / "1_photo", tmp_path / "photos")
    write_toy_checkpoint(tmp_path / "model.safetensors")
    write_blip(tmp_path / "Salesforce" / "blip-image-captioning-large")
    write_git(tmp_path / "microsoft" / "git-large-textcaps")
    (tmp_path / "wd14_tagger_model").mkdir()
    (tmp_path / "wd14_tagger_model" / "model.onnx").write_bytes(b"not opened")
    (tmp_path / "wd14_tagger_model" / "selected_tags.csv").write_text(TABLE)
    monkeypatch.setattr(tagging_run, "_open_session", lambda path: FakeSession())
    monkeypatch.setattr(faces_run, "_package_detector", lambda: lambda pixels: [Face((100, 90), (40, 50), 5.0)])
    monkeypatch.chdir(tmp_path)

    def call(words: list[str]) -> int:
        script = Path(words[1])
        argv = [*words[2:], *QUICK.get(script.name, "").split()]
        if script.name == "train_network.py":
            return run(SCRIPT, argv)
        return importlib.import_module(f"tools.{script.stem}").main(argv)

    return call


def test_every_command_of_the_document_runs(
    walk: Callable[[list[str]], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for words in commands():
        if "train_network.py" in words[1]:
            monkeypatch.setattr("library.data.dataset.read_image", lambda path: pytest.fail(f"{path} was decoded"))
        assert walk(words) == 0, " ".join(words)
    names = {path.stem for path in (tmp_path / "photos").glob("*.jpg")}
    assert len(names) == 7
    assert not (tmp_path / "aside").exists()  # these photos are good
    assert "Data set report" in (tmp_path / "report.html").read_text()
    for suffix in (".caption", ".git", ".tags", ".npz"):
        assert {path.stem for path in (tmp_path / "photos").glob(f"*{suffix}")} == names
    assert len(list((tmp_path / "smaller").glob("*+1024x1024.txt"))) == 7
    assert len(list((tmp_path / "faces").glob("*.png"))) == len(list((tmp_path / "edges").glob("*.png"))) == 7
    metadata = json.loads((tmp_path / "photos.json").read_text())
    assert set(metadata) == names
    assert all({"caption", "tags", "train_resolution"} == set(entry) for entry in metadata.values())
    assert (tmp_path / "out" / "toy.safetensors").is_file()
