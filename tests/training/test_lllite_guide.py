"""The guide to training a ControlNet-LLLite works as it is written; the caching tools serve such a training."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.records import DatasetKind
from library.data.spec import load_dataset_specs
from library.options import DataOptions
from library.options.script import parse
from library.options.scripts import CACHE_LATENTS, CACHE_TEXT
from library.training.ahead import cache_latents_ahead, cache_text_ahead
from library.training.app import run
from tests.training.runs import LLLITE_SCRIPT, ROOT, train, write_pairs
from tools.canny import main as canny

GUIDE = (ROOT / "docs" / "control.md").read_text("utf-8")
SECTION = GUIDE.partition("## Training a ControlNet-LLLite\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in as the guide says, with its images; the edges are still to be made."""
    images, edges = write_pairs(tmp_path / "data", [(64, 64), (80, 64)])
    for path in edges.iterdir():
        path.unlink()
    for path in images.glob("*.caption"):
        path.rename(path.with_suffix(".txt"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_data_set_of_the_guide(tmp_path: Path) -> None:
    (text,) = [body for language, body in BLOCKS if language == "toml"]
    (tmp_path / "data.toml").write_text(text)
    options = DataOptions(dataset_config=tmp_path / "data.toml")
    (spec,) = load_dataset_specs(options, frozenset({DatasetKind.CONTROL}))
    assert spec.subsets[0].conditioning_data_dir == "data/edges"


@pytest.mark.parametrize("by_file", [True, False])
def test_caches_made_ahead_are_used(
    by_file: bool, place: Path, model_sdxl: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a data set file as well as by the two folders on the command line."""
    assert canny(["--input", "data/images", "--output", "data/edges"]) == 0
    (place / "data.toml").write_text(
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "data/images"\n'
        'conditioning_data_dir = "data/edges"\n'
    )
    folders = "--train_data_dir data/images --conditioning_data_dir data/edges --resolution 64"
    data = ("--dataset_config", "data.toml") if by_file else folders.split()
    words = ["--pretrained_model_name_or_path", str(model_sdxl), *data, "--max_data_loader_n_workers", "0"]
    assert cache_latents_ahead(parse(CACHE_LATENTS, [*words, "--sdxl"])).encoded == 2
    assert cache_text_ahead(parse(CACHE_TEXT, words)).encoded == 2
    caching = (
        "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk --max_train_steps 1 --seed 1 --output_dir out"
    )
    with caplog.at_level(logging.INFO):
        assert run(LLLITE_SCRIPT, [*words, *caching.split()]) == 0
    assert "latents: 2 images, 2 reused, 0 encoded" in caplog.text


def test_the_sheet_of_the_data_shows_both_pictures(place: Path) -> None:
    assert canny(["--input", "data/images", "--output", "data/edges"]) == 0
    words = ("--conditioning_data_dir", "data/edges", "--debug_dataset")
    assert train(Path("no model"), Path("data/images"), Path("out"), *words, script=LLLITE_SCRIPT) == 0
    sheet = next((place / "out" / "debug_dataset").glob("*.png"))
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    with Image.open(place / "data" / "edges" / "photo0.png") as edges:
        wanted = np.asarray(edges)
    found = [pixels[8:72, left + 64 : left + 128] for left in (8, 208)]
    assert any(np.array_equal(one, wanted) for one in found)
