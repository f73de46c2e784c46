"""Learning that can be seen: the quickstart teaches the built-in model a shape, and broken trainings do not pass.

The verdict reads drawn pictures by image analysis; it is what the other tests' numbers stand for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from library.diffusion.objective import Objective, TrainingInputs
from library.generation.scoring import OTHERS, SUBJECT, USUAL_SCALE, score
from library.options.scenes import ScoreOptions
from library.training.app import run
from networks.adapter import Adapter
from tests.house.source_map import ROOT
from tests.training.runs import SCRIPT

MODEL = ROOT / "examples" / "tiny" / "tiny-sd1.safetensors"
FISH = ROOT / "examples" / "fish"
WORD = "sks"
MANY_PROMPTS, FEW_PROMPTS, SAMPLING_STEPS = 24, 8, 10
STEPS = 100  # a third of the quickstart's
LEAST_TAUGHT = {"ground": 0.9, "colour": 0.8, "shape": 0.4}
LEAST_KNOWN = {"ground": 0.9, "colour": 0.9, "shape": 0.65}
MOST_LEAKED = 0.1
MOST_UNMOVED = 0.1  # the lowest level of the U-Net sees one pixel of 64 px pictures: some of its layers never move


def verdict(lora: Path, prompts: int = FEW_PROMPTS) -> list[str]:
    """What a good LoRA of the fish does not have: layers that learned nothing, prompts that are not followed."""
    ends = [tensor.any().item() for key, tensor in load_file(lora).items() if key.endswith("lora_up.weight")]
    problems = ["layers did not move"] * (ends.count(False) > MOST_UNMOVED * len(ends))
    options = ScoreOptions(
        ckpt=str(MODEL),
        network_weights=str(lora),
        subject="fish",
        subject_word=WORD,
        count=prompts,
        steps=SAMPLING_STEPS,
    )
    found = score(options, USUAL_SCALE)
    for kind, least in ((SUBJECT, LEAST_TAUGHT), (OTHERS, LEAST_KNOWN)):
        problems += [f"{name}, {kind}" for name, share in least.items() if found[kind][name].value < share]
    problems += ["fish without the word"] * (found[OTHERS]["fish"].value > MOST_LEAKED)
    for kind, answers in found.items():
        print(kind, {name: str(share) for name, share in answers.items()})
    print(problems)
    return problems


def train(out: Path, steps: int, *more: str) -> Path:
    """Train by the quickstart's configuration, without previews; the file."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--config_file", str(ROOT / "examples" / "quickstart.toml"), "--output_dir", str(out)]
    argv += ["--sample_prompts", "", "--no-sample_at_first", "--sample_every_n_steps", "None"]
    assert run(SCRIPT, [*argv, "--max_train_steps", str(steps), *more]) == 0
    return out / "fish.safetensors"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_lora_teaches_a_new_shape_and_spoils_nothing(tmp_path: Path) -> None:
    assert verdict(train(tmp_path, STEPS), MANY_PROMPTS) == []


def test_nothing_is_taught_without_a_learning_rate(tmp_path: Path) -> None:
    problems = verdict(train(tmp_path, 5, "--unet_lr", "1e-30", "--text_encoder_lr", "1e-30"))
    assert "shape, subject" in problems


def test_a_wrong_target_spoils_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer refuses ``--v_parameterization`` with this model, so the target is bent here: latents, not noise."""
    right = Objective.training_inputs

    def bent(self: Objective, latents_BCHW: Tensor, *more: Any) -> TrainingInputs:
        return right(self, latents_BCHW, *more)._replace(target_BCHW=latents_BCHW.float())

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "training_inputs", bent)
        lora = train(tmp_path, 20)
    assert {"shape, subject", "shape, others"} <= set(verdict(lora))


def test_captions_of_other_pictures_teach_something_else(tmp_path: Path) -> None:
    folder = shutil.copytree(FISH, tmp_path / "data") / "10_sks"
    captions = sorted(folder.glob("*.txt"))
    texts = [path.read_text("utf-8") for path in captions]
    for path, text in zip(captions, texts[5:] + texts[:5], strict=True):
        path.write_text(text, "utf-8")
    problems = verdict(train(tmp_path, STEPS // 2, "--train_data_dir", str(folder.parent)), 12)
    assert "ground, subject" in problems


def test_layers_that_are_not_attached_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach, seen = Adapter.attach, []

    def every_second(adapter: Adapter) -> None:
        seen.append(adapter)
        if len(seen) % 2:
            attach(adapter)

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "attach", every_second)
        lora = train(tmp_path, 5)
    assert "layers did not move" in verdict(lora)
