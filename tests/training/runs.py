"""Runs the trainer in this process on the toy model, as a user's command line would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from library.options.scripts import SDXL_TRAIN_LLLITE, SDXL_TRAIN_NETWORK, TRAIN_CONTROLNET, TRAIN_NETWORK
from library.training import loop
from library.training.app import run
from library.training.script import Script
from tests.training.processes import launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Script(TRAIN_NETWORK, kind="library.training.kinds.adapter:AdapterTraining", tracker_name="network_train")
SDXL_SCRIPT = Script(SDXL_TRAIN_NETWORK, kind=SCRIPT.kind, tracker_name=SCRIPT.tracker_name)
LLLITE_SCRIPT = Script(SDXL_TRAIN_LLLITE, kind="library.training.kinds.control:LLLiteTraining", tracker_name="lllite")
CONTROL_SCRIPT = Script(
    TRAIN_CONTROLNET, kind="library.training.kinds.control:ControlNetTraining", tracker_name="controlnet_train"
)
# Adam turns gradients of rounding size into whole steps of either sign, so equal mathematics is compared under SGD.
SGD = ("--optimizer_type", "SGD", "--learning_rate", "0.1", "--max_grad_norm", "0")


def write_photos(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> Path:
    """Images of smooth random colours with a caption each, in ``folder/1_sks thing``; returns ``folder``."""
    place = folder / "1_sks thing"
    place.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index, (width, height) in enumerate(sizes):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        image.save(place / f"photo{index}.png")
        (place / f"photo{index}.caption").write_text(f"a sks thing, number {index}, on a table")
    return folder


def write_pairs(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> tuple[Path, Path]:
    """Captioned images in ``folder/images`` and in ``folder/edges`` the outlines of their colours; returns both."""
    images, edges = folder / "images", folder / "edges"
    (write_photos(folder, sizes, seed) / "1_sks thing").rename(images)
    edges.mkdir()
    for path in images.glob("*.png"):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L")).astype(int)
        steps = np.abs(np.diff(grey, axis=0, append=grey[-1:])) + np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
        Image.fromarray(np.where(steps > np.median(steps), 255, 0).astype(np.uint8)).save(edges / path.name)
    return images, edges


def command(model: Path, data: Path, out: Path, *more: str, script: Script = SCRIPT) -> list[str]:
    """A command line with what every run here has; ``more`` wins."""
    network = ["--network_module", "networks.lora"] if "network_module" in script.options.specs() else []
    return [
        "--pretrained_model_name_or_path", str(model), *network, "--output_dir", str(out),
        "--output_name", "toy", "--train_data_dir", str(data), "--resolution", "64", "--seed", "7",
        "--learning_rate", "1e-3", "--max_train_steps", "4", "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip


def train(model: Path, data: Path, out: Path, *more: str, script: Script = SCRIPT) -> int:
    """Run to the end; returns the exit status."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return run(script, command(model, data, out, *more, script=script))


def launch_two(script: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run an entry script in two processes on the CPU."""
    return launch(script, arguments, 2)


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    with safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    with safe_open(str(path), "pt") as file:
        return file.metadata()


def state(folder: Path) -> dict[str, object]:
    """state.json of a state folder."""
    return json.loads((folder / "state.json").read_text())


def difference(a: Path, b: Path) -> float:
    """Largest difference of two files' tensors, relative to the largest change."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    ups = [key for key in left if "lora_up" in key or ".up." in key]
    size = max(float(left[key].abs().max()) for key in ups)
    assert size > 1e-4  # something was learned
    error = max(float((left[key] - right[key]).abs().max()) for key in left) / size
    print(f"largest relative difference: {error:.2e}")
    return error


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send Ctrl-C to the program when that many steps are done."""
    original = loop.train_step

    def train_step(job, plan, batches):
        report = original(job, plan, batches)
        if job.clock.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    monkeypatch.setattr(loop, "train_step", train_step)
