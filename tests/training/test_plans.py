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


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--optimizer_type", "AdamWScheduleFree", "--ema_decay", "0.9"), "--ema_decay: schedule-free optimizers"),
        (("--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=0"), "StepLR fails after step 1 of 1"),
        (("--lr_scheduler", "polynomial", "--lr_scheduler_args", "lr_end=-1"), "the learning rate is -"),
    ],
    ids=["average", "class", "rate"],
)
def test_what_rates_and_averages_cannot_be_is_told_before_a_weight_is_read(
    bench: Bench, options: tuple[str, ...], words: str, more: tuple[str, ...]
):
    """The run told the first two after the latents, the plan not the average; rates below 0 were taken."""
    steps = ("--max_train_steps", "4") if "polynomial" in options else ()
    (line,) = bench.refusal(*options, *steps, *more)
    assert words in line


def test_what_only_this_machine_cannot_do_is_told_and_stops_no_plan(bench: Bench):
    """It was not told at all: the run refused what its plan had found good."""
    (line,) = bench.refusal("--mixed_precision", "fp16")
    assert "--mixed_precision fp16 does not work on a CPU" in line
    assert bench.run("--mixed_precision", "fp16", "--dry_run") == 0
    assert f"a run on this machine would be refused: {line}" in bench.capsys.readouterr().err
