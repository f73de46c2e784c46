"""The walk of docs/data_preparation.md: every command, in its order, in a folder with photos and toy models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from library.preparation import faces_run, tagging_run
from library.preparation.faces import Face
from tests.captioner_fixtures import write_blip, write_git
from tests.guides import commands_of, run_command, script_and_options
from tests.house.source_map import ROOT
from tests.toy import write_toy_checkpoint
from tests.unit.test_tagging import TABLE, FakeSession

# Added for speed: small sizes, few steps.
QUICK = {
    "prepare_buckets_latents.py": "--max_resolution 64,64 --min_bucket_reso 32 --bucket_reso_steps 8",
    "train_network.py": "--max_train_epochs 1 --network_dim 2 --output_name toy --learning_rate 1e-3 --seed 1",
    "make_captions.py": "--max_length 12",
    "make_captions_by_git.py": "--max_length 12",
}


COMMANDS = commands_of(ROOT / "docs" / "data_preparation.md")


def test_the_document_shows_every_tool():
    shown = {Path(script_and_options(command)[0]).name for command in COMMANDS}
    named = {path.name for path in (ROOT / "finetune").glob("*.py")} | {"check_dataset.py", "canny.py"}
    assert named | {"detect_face_rotate.py", "resize_images_to_resolution.py", "train_network.py"} == shown


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
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

    def call(command: str) -> int:
        return run_command(command, QUICK.get(Path(script_and_options(command)[0]).name, ""))

    return call


def test_every_command_of_the_document_runs(
    walk: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for command in COMMANDS:
        if "train_network.py" in command:
            monkeypatch.setattr("library.data.dataset.read_image", lambda path: pytest.fail(f"{path} was decoded"))
        assert walk(command) == 0, command
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
