"""Learning that can be seen: a LoRA teaches the built-in model a shape, and trainings that are broken do not pass.

The verdict reads drawn pictures by image analysis; it is what the other tests' numbers stand for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.generation.scoring import OTHERS, SUBJECT, score
from library.options.scenes import ScoreOptions
from networks.adapter import Adapter
from tests.house.source_map import ROOT
from tests.training import runs

MODEL = ROOT / "examples" / "tiny" / "tiny-sd1.safetensors"
FISH = ROOT / "examples" / "fish"
SETTINGS = (
    "--network_dim", "8", "--network_alpha", "8", "--unet_lr", "3e-3", "--text_encoder_lr", "1e-3",
    "--train_batch_size", "4", "--max_train_steps", "150", "--cache_latents", "--lr_scheduler", "cosine",
    "--min_snr_gamma", "5", "--reg_data_dir", str(ROOT / "examples" / "shapes"),
)  # fmt: skip
PROMPTS = 24
LEAST_KNOWN, LEAST_TAUGHT, MOST_LEAKED = 0.7, 0.6, 0.1


def verdict(lora: Path) -> list[str]:
    """What a good LoRA of the fish does not have: modules that learned nothing, prompts that are not followed."""
    problems = [key for key, tensor in load_file(lora).items() if key.endswith("lora_up.weight") and not tensor.any()]
    options = ScoreOptions(ckpt=str(MODEL), network_weights=str(lora), subject="fish", count=PROMPTS, steps=10)
    found = score(options, 5.0)
    for name in ("ground", "colour", "shape"):
        problems += [f"{name} with the word: {found[SUBJECT][name]}"] * (found[SUBJECT][name].value < LEAST_TAUGHT)
        problems += [f"{name} without it: {found[OTHERS][name]}"] * (found[OTHERS][name].value < LEAST_KNOWN)
    problems += [f"fish without the word: {found[OTHERS]['fish']}"] * (found[OTHERS]["fish"].value > MOST_LEAKED)
    return problems


def train(out: Path, *more: str, data: Path = FISH) -> list[str]:
    """Train with the usual settings and ``more``; the verdict on the file."""
    assert runs.train(MODEL, data, out, *SETTINGS, *more) == 0
    problems = verdict(out / "toy.safetensors")
    print("\n".join(problems))
    return problems


def test_a_lora_teaches_a_new_shape_and_spoils_nothing(tmp_path: Path) -> None:
    assert train(tmp_path) == []


def test_nothing_is_taught_without_a_learning_rate(tmp_path: Path) -> None:
    rates = ("--learning_rate", "1e-30", "--unet_lr", "1e-30", "--text_encoder_lr", "1e-30")
    problems = train(tmp_path, *rates)
    assert any("shape with the word" in problem for problem in problems)


def test_a_wrong_target_spoils_the_pictures(tmp_path: Path) -> None:
    assert any("with the word" in problem for problem in train(tmp_path, "--v_parameterization"))


def test_captions_of_other_pictures_teach_wrong_colours(tmp_path: Path) -> None:
    folder = shutil.copytree(FISH, tmp_path / "data") / "10_sks"
    captions = sorted(folder.glob("*.txt"))
    texts = [path.read_text("utf-8") for path in captions]
    for path, text in zip(captions, texts[5:] + texts[:5], strict=True):
        path.write_text(text, "utf-8")
    problems = train(tmp_path, data=folder.parent)
    assert any("colour" in problem or "ground" in problem for problem in problems)


def test_modules_that_are_not_attached_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach, seen = Adapter.attach, []

    def every_second(adapter: Adapter) -> None:
        seen.append(adapter)
        if len(seen) % 2:
            attach(adapter)

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "attach", every_second)
        assert runs.train(MODEL, FISH, tmp_path, *SETTINGS, "--max_train_steps", "5") == 0
    assert any("lora_up" in problem for problem in verdict(tmp_path / "toy.safetensors"))
