"""A plan (--dry_run) refuses what the run refuses, in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.scripts import TRAIN_DB
from library.training import prepare
from library.training.script import Script
from tests.training.bench import Bench
from tests.training.runs import train

DREAMBOOTH = Script(TRAIN_DB, kind="library.training.kinds.full:FullTraining", tracker_name="dreambooth")


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "plan"])
def test_strengths_of_data_sets_where_nothing_has_one(
    model: Path, photos: Path, tmp_path: Path, capsys, monkeypatch, more: tuple[str, ...]
):
    """They were refused at the first batch of such a data set, after all latents and perhaps many steps."""
    monkeypatch.setattr(prepare, "make_latents", lambda *_: pytest.fail("the latents were made first"))
    subset = f'[[datasets.subsets]]\nimage_dir = "{photos / "1_sks thing"}"\n'
    file = tmp_path / "data.toml"
    file.write_text(f"[[datasets]]\n{subset}[[datasets]]\nnetwork_multiplier = 0.5\n{subset}")
    assert train(model, photos, tmp_path / "out", "--dataset_config", str(file), *more, script=DREAMBOOTH) == 1
    said = capsys.readouterr().err.partition("error: ")[2].strip()
    assert said == "network_multiplier: is for networks, the model itself has no strength; leave it out"


def test_what_only_this_machine_cannot_do_is_told_and_stops_no_plan(bench: Bench):
    """It was not told at all: the run refused what its plan had found good."""
    (line,) = bench.refusal("--mixed_precision", "fp16")
    assert "--mixed_precision fp16 does not work on a CPU" in line
    assert bench.run("--mixed_precision", "fp16", "--dry_run") == 0
    assert f"a run on this machine would be refused: {line}" in bench.capsys.readouterr().err
