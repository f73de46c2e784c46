"""Engines around toy models, jobs, and network files for them: for the tests of drawing with networks and regions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from library.diffusion.schedule import make_schedule
from library.families.base import ModelFamily, ModelParts, ModelSource
from library.families.sd import SdFamily
from library.families.sdxl import SdxlFamily
from library.generation.engine import Engine, EngineSettings
from library.generation.jobs import AND, Job, Shared
from library.options.scripts import GEN_IMG
from library.options.settings import Settings
from networks import lora
from tests.networks_fixtures import randomise
from tests.toy import toy_modules, toy_spec

CPU = torch.device("cpu")


def family_of(kind: str) -> ModelFamily:
    return SdxlFamily() if kind == "sdxl" else SdFamily(v2=kind == "sd2")


def toy_model(kind: str = "sd1") -> ModelParts:
    """A fresh toy model in eval mode, without a file."""
    modules: dict[str, Any] = toy_modules(kind)
    for module in modules.values():
        module.eval().requires_grad_(False)
    spec = toy_spec(kind)
    encoders = tuple(modules[name] for name in spec.text_parts)
    return ModelParts(encoders, modules["unet"], modules["vae"], spec, "epsilon", ModelSource("toy", Path("toy")))


def make_engine(kind: str = "sd1", parts: ModelParts | None = None) -> Engine:
    return Engine(family_of(kind), parts or toy_model(kind), EngineSettings(make_schedule(), CPU))


def options(**values: Any) -> Settings:
    """The generator's options with these given."""
    return Settings(GEN_IMG, values, {})


def make_job(prompt: str, seed: int = 3, mask: str | None = None, negative: str = "blurry", **shared: Any) -> Job:
    """A picture of 64 px in 3 steps; with a mask AND divides it."""
    told: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "sampler": "euler", "scale": 5.0, **shared}
    if mask is not None:
        told = {"regional": True, "parts": len(prompt.split(AND)), **told}
    return Job(0, prompt, prompt, negative, seed, Shared(**told), mask=mask)


def picture(engine: Engine, *jobs: Job) -> np.ndarray:
    """The pictures of a batch in 0..1, (B, height, width, 3)."""
    images_BCHW = engine.draw(list(jobs))
    return (images_BCHW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def write_network(path: Path, kind: str = "sd1", seed: int = 1, size: float = 0.3, **args: Any) -> str:
    """A LoRA file for the toy whose effect can be seen. ``only``: text_encoder or unet."""
    only = args.pop("only", None)
    views = family_of(kind).adapter_views(toy_model(kind))
    encoders: Any = views.text_encoders[0] if len(views.text_encoders) == 1 else views.text_encoders
    network = lora.create_network(1.0, 4, 2.0, None, encoders, views.unet, **args)
    network.apply_to(encoders, views.unet, only in (None, "text_encoder"), only in (None, "unet"))
    randomise(network, seed, size)
    network.save_weights(str(path), torch.float32, {"ss_network_module": "networks.lora"})
    return str(path)


def write_mask(path: Path, colors: Sequence[Sequence[tuple[int, int, int]]], size: int = 64) -> str:
    """A picture of equal rectangles in these colours, row by row."""
    from PIL import Image

    pixels = np.array(colors, dtype=np.uint8)
    rows, columns = size // len(colors), size // len(colors[0])
    Image.fromarray(pixels.repeat(rows, 0).repeat(columns, 1)).save(path)
    return str(path)


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())
