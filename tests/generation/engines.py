"""Engines around toy models, and jobs for them, without files of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from library.diffusion.schedule import make_schedule
from library.families.base import ModelParts, ModelSource
from library.families.sd import SdFamily
from library.families.sdxl import SdxlFamily
from library.generation.engine import Engine, EngineSettings
from library.generation.from_picture import attach_pictures
from library.generation.jobs import Job, Shared
from library.options.generation import PictureOptions
from tests.text_diffusion_fixtures import toy_parts
from tests.toy import toy_modules, toy_spec

CPU = torch.device("cpu")


def sdxl_parts() -> ModelParts:
    """A toy SDXL in eval mode, without a file."""
    modules: dict[str, Any] = toy_modules("sdxl")
    for module in modules.values():
        module.eval().requires_grad_(False)
    texts = (modules["text_encoder"], modules["text_encoder_2"])
    source = ModelSource("toy", Path("toy"))
    return ModelParts(texts, modules["unet"], modules["vae"], toy_spec("sdxl"), "epsilon", source)


def engine_of(parts: ModelParts, **options: Any) -> Engine:
    """An engine that can begin from pictures."""
    name = parts.spec.family
    family = SdxlFamily() if name == "sdxl" else SdFamily(v2=name == "sd2")
    engine = Engine(family, parts, EngineSettings(make_schedule(parts.prediction_type), CPU))
    attach_pictures(engine, PictureOptions(**options))
    return engine


def toy_engine(family: str = "sd1", **options: Any) -> Engine:
    """An engine of its own toy model."""
    return engine_of(sdxl_parts() if family == "sdxl" else toy_parts(family), **options)


def job(seed: int = 3, files: dict[str, Any] | None = None, **shared: Any) -> Job:
    """A picture of 64 px with 5 steps, unless ``shared`` says something else."""
    values = {"width": 64, "height": 64, "steps": 5, "sampler": "euler", "scale": 4.0, **shared}
    return Job(0, "a cat", "a photo of a cat", "blurry", seed, Shared(**values), **(files or {}))


def write_picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> str:
    """A picture of smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


def write_mask(path: Path, white: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> str:
    """A mask that is white in a box (left, top, right, bottom)."""
    mask = Image.new("L", size, 0)
    mask.paste(255, white)
    mask.save(path)
    return str(path)


def pixels(path: Path | str) -> np.ndarray:
    """The colours of a picture file as whole numbers."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)
