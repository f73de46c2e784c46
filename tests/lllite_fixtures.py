"""Short runs of sdxl_train_control_net_lllite.py on toy pairs: what `tests/training/test_lllite*.py` share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.models.save import save_single_file
from library.training.script import Script
from networks.lllite import ControlNetLLLite, LLLiteSize
from tests.toy import toy_modules, toy_spec
from tests.training.runs import CONTROL_SCRIPT, LLLITE_SCRIPT, tensors, train

SMALL = ("--cond_emb_dim", "8", "--network_dim", "6")
TWO_STEPS = ("--max_train_steps", "2")
UNMOVED = "attn1_to_k.up.0.bias"  # attention does not change if all keys are shifted alike


@dataclass(frozen=True)
class Pairs:
    """Images and the pictures that belong to them."""

    images: Path
    edges: Path


def write_stripes(folder: Path, family: str = "sd1") -> tuple[Path, Path, Path, Path]:
    """A toy model with latents of the size that trained VAEs have; two images of stripes under one caption; the
    pictures that belong to them; and these exchanged.
    """
    modules: dict[str, Any] = dict(toy_modules(family))
    with torch.no_grad():
        modules["vae"].quant_conv.weight[:4] *= 15
    model = folder / "model.safetensors"
    save_single_file(model, toy_spec(family), modules, torch.float32, None)
    images, edges, wrong = (folder / name for name in ("images", "edges", "wrong"))
    rows, columns = np.mgrid[0:64, 0:64]
    for name, place in {"lying": rows, "standing": columns}.items():
        picture = Image.fromarray(((place // 8) % 2 * 255).astype(np.uint8)).convert("RGB")
        for target in (images, edges):
            target.mkdir(exist_ok=True)
            picture.save(target / f"{name}.png")
        (images / f"{name}.txt").write_text("stripes")
    shutil.copytree(edges, wrong)
    (wrong / "lying.png").write_bytes((edges / "standing.png").read_bytes())
    (wrong / "standing.png").write_bytes((edges / "lying.png").read_bytes())
    return model, images, edges, wrong


def write_begun(path: Path) -> Path:
    """A net that does something already, so that all of its tensors learn from the first step on."""
    net = ControlNetLLLite(toy_modules("sdxl")["unet"], LLLiteSize(8, 6))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    net.save_weights(path)
    return path


def run(model: Path, data: Pairs, out: Path, *options: str, script: Script = LLLITE_SCRIPT) -> Path:
    """The file that a run with these options writes."""
    words = ("--conditioning_data_dir", str(data.edges), *options)
    assert train(model, data.images, out, *words, script=script) == 0
    return out / "toy.safetensors"


def refusal(
    model: Path,
    data: Pairs,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    script: Script = LLLITE_SCRIPT,
) -> str:
    """What a run that cannot be says."""
    capsys.readouterr()
    assert train(model, data.images, out, *options, script=script) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def apart(one: Path, other: Path, start: Path) -> float:
    """Largest difference of two files' tensors, relative to how far that tensor moved from where it began."""
    a, b, begin = tensors(one), tensors(other), tensors(start)
    assert a.keys() == b.keys() == begin.keys()
    return max(relative(a[key], b[key], begin[key]) for key in a if not key.endswith(UNMOVED))


def relative(a: Tensor, b: Tensor, begin: Tensor) -> float:
    moved = float((a - begin).abs().max())
    assert moved > 1e-5
    return float((a - b).abs().max()) / moved


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def control(model: Path, data: Pairs, out: Path, *options: str) -> Path:
    """Train a ControlNet instead; its file."""
    return run(model, data, out, *options, script=CONTROL_SCRIPT)
