"""Toy ControlNets, and guide pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from library.diffusion.schedule import make_schedule
from library.families.base import ModelFamily, ModelParts
from library.generation.engine import Engine, EngineSettings
from library.generation.jobs import Job, Shared
from library.models.control import control_config, empty_control
from library.options.script import parse
from library.options.scripts import GEN_IMG
from tests.toy import toy_spec


def toy_control(family: str = "sd1", seed: int = 1) -> Any:
    """A ControlNet for the toy model whose outputs are of the size of the U-Net's own states, not zero."""
    net: Any = empty_control(control_config(toy_spec(family).unet)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(net.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.01)
            else:
                gain = 2.5 if "cond_embedding" in name else 1.0  # the guide must weigh more than the constant part
                weight.copy_(gain * torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    return net.eval().requires_grad_(False)


def guide_picture(path: Path, seed: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    """A picture of random patches with hard edges; ``size`` is (width, height)."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def control_settings(*arguments: str) -> Any:
    """Checked options of gen_img.py."""
    return parse(GEN_IMG, ["--prompt", "unused", *arguments])


def toy_engine(family: ModelFamily, parts: ModelParts) -> Engine:
    """An engine on the CPU in float32."""
    return Engine(family, parts, EngineSettings(make_schedule(parts.prediction_type), torch.device("cpu")))


def toy_job(*guides: Path, seed: int = 3, prompt: str = "a photo of a cat", **shared: Any) -> Job:
    """A small picture; ``shared`` wins."""
    values: dict[str, Any] = {"width": 64, "height": 64, "steps": 4, "sampler": "ddim", "scale": 5.0}
    return Job(0, prompt, prompt, "blurry", seed, Shared(**{**values, **shared}), guides=tuple(map(str, guides)))


def as_floats(pictures_BCHW: torch.Tensor) -> np.ndarray:
    """The first picture of a batch (height, width, 3) in 0..1."""
    return (pictures_BCHW[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
