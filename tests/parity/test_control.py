"""With ControlNets our pictures equal those of diffusers' pipelines on the same modules, latents and guide pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from library.families.base import ModelParts
from library.families.sd import SdFamily
from library.families.sdxl import SdxlFamily
from library.generation.control import attach_control
from library.models.control import save_control_file
from library.options import ModelOptions
from tests.control_fixtures import as_floats, control_settings, guide_picture, toy_control, toy_engine, toy_job
from tests.text_diffusion_fixtures import diffusers_pipeline, toy_parts
from tests.toy import toy_spec, write_toy_checkpoint

DIFFUSERS: Any = diffusers  # its classes' annotations are wrong in places
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


def ours(family: Any, parts: ModelParts, nets: list[Path], guides: list[Path], *more: str, **shared: Any) -> np.ndarray:
    engine = toy_engine(family, parts)
    attach_control(engine, control_settings("--control_net_models", *map(str, nets), *more))
    return as_floats(engine.draw([toy_job(*guides, **shared)]))


def theirs(pipeline: Any, guides: list[Path], scales: list[float], size: int = 64) -> np.ndarray:
    pictures = [Image.open(path).convert("RGB") for path in guides]
    several = len(guides) > 1
    return pipeline(
        "a photo of a cat",
        negative_prompt="blurry",
        image=pictures if several else pictures[0],
        width=size,
        height=size,
        num_inference_steps=4,
        guidance_scale=5.0,
        controlnet_conditioning_scale=scales if several else scales[0],
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]


def files(folder: Path, family: str, count: int) -> tuple[list[Any], list[Path], list[Path]]:
    """Nets, their files, guide pictures."""
    nets = [toy_control(family, seed) for seed in range(1, 1 + count)]
    paths = [folder / f"net{index}.safetensors" for index in range(count)]
    for net, path in zip(nets, paths, strict=True):
        save_control_file(path, net, toy_spec(family).unet)
    return nets, paths, [guide_picture(folder / f"guide{index}.png", index) for index in range(count)]


def compare(picture: np.ndarray, expected: np.ndarray, plain: np.ndarray, what: str) -> None:
    difference = float(np.abs(picture - expected).max())
    print(f"{what}: largest difference {difference:.2e}")
    assert expected.std() > 0.02
    assert np.abs(expected - plain).max() > 0.02  # the nets do something
    assert difference < 1e-4


@pytest.mark.parametrize(("family", "prediction"), [("sd1", "epsilon"), ("sd2", "v_prediction")])
def test_one_net_draws_diffusers_picture(family: str, prediction: str, tmp_path: Path) -> None:
    parts = toy_parts(family, prediction)
    nets, paths, guides = files(tmp_path, family, 1)
    base = diffusers_pipeline(parts, DIFFUSERS.DDIMScheduler(**SCHEDULER, prediction_type=prediction))
    pipeline = DIFFUSERS.StableDiffusionControlNetPipeline(
        **base.components, controlnet=nets[0], requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    own: Any = SdFamily(v2=family == "sd2")
    picture = ours(own, parts, paths, guides, "--control_net_multipliers", "0.7")
    plain = as_floats(toy_engine(own, parts).draw([toy_job()]))
    compare(picture, theirs(pipeline, guides, [0.7]), plain, family)


def test_two_nets_are_summed_as_diffusers_sums_them(tmp_path: Path) -> None:
    parts = toy_parts()
    nets, paths, guides = files(tmp_path, "sd1", 2)
    base = diffusers_pipeline(parts, DIFFUSERS.DDIMScheduler(**SCHEDULER))
    pipeline = DIFFUSERS.StableDiffusionControlNetPipeline(
        **base.components, controlnet=DIFFUSERS.MultiControlNetModel(nets), requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    own = SdFamily()
    picture = ours(own, parts, paths, guides, "--control_net_weights", "0.5", "1.2")
    one = ours(own, parts, paths[:1], guides[:1], "--control_net_multipliers", "0.5")
    compare(picture, theirs(pipeline, guides, [0.5, 1.2]), one, "two nets")


def test_sdxl_draws_diffusers_picture(tmp_path: Path) -> None:
    own = SdxlFamily()
    path = write_toy_checkpoint(tmp_path / "toy.safetensors", "sdxl")
    parts = own.load(ModelOptions(pretrained_model_name_or_path=str(path)))
    own.save_diffusers(parts, tmp_path / "folder", None)
    nets, paths, guides = files(tmp_path, "sdxl", 1)
    base: Any = DIFFUSERS.StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "folder"), local_files_only=True)
    pipeline = DIFFUSERS.StableDiffusionXLControlNetPipeline(
        **{**base.components, "scheduler": DIFFUSERS.DDIMScheduler(**SCHEDULER)}, controlnet=nets[0]
    )
    pipeline.set_progress_bar_config(disable=True)
    picture = ours(own, parts, paths, guides)
    plain = as_floats(toy_engine(own, parts).draw([toy_job()]))
    compare(picture, theirs(pipeline, guides, [1.0]), plain, "sdxl")
