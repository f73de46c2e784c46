"""Previews drawn after a picture: the same drawing as that of plain previews, with a net taking part."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.diffusion.schedule import make_schedule
from library.families.base import ModelParts
from library.families.sdxl import SdxlFamily
from library.generation.control import LLLiteNets, Use
from library.generation.guided import generate_guided
from library.generation.pipeline import GenerationSettings, generate
from library.generation.prompts import PromptSpec
from library.log import UserError
from library.options import ModelOptions
from networks.lllite import ControlNetLLLite, LLLiteSize
from tests.control_fixtures import guide_picture
from tests.toy import write_toy_checkpoint

FAMILY = SdxlFamily()
LONG = "a (red:1.3) cat, " * 30


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> ModelParts:
    path = write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "xl.safetensors", "sdxl")
    return FAMILY.load(ModelOptions(pretrained_model_name_or_path=str(path)))


def settings(parts: ModelParts) -> GenerationSettings:
    return GenerationSettings(make_schedule(parts.prediction_type), torch.device("cpu"), default_sampler="euler_a")


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize(
    "prompt",
    [
        PromptSpec("a cat", "blurry", 64, 96, seed=3, sample_steps=3),
        PromptSpec(LONG, "", 64, 64, seed=4, sample_steps=2, scale=1.0, sample_sampler="ddim"),
        PromptSpec("", LONG, seed=5, sample_steps=2, scale=4.0, sample_sampler="heun"),
    ],
    ids=["size", "long", "usual size"],
)
def test_it_draws_what_plain_previews_draw(prompt: PromptSpec, parts: ModelParts) -> None:
    plain = generate(FAMILY, parts, prompt, settings(parts))
    guided = generate_guided(FAMILY, parts, prompt, settings(parts), lambda _: nullcontext())
    assert plain.size == guided.size
    assert abs(pixels(plain) - pixels(guided)).max() <= 1


def test_the_net_follows_its_picture(parts: ModelParts, tmp_path: Path) -> None:
    net = ControlNetLLLite(parts.unet, LLLiteSize(8, 6))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    net.attach()
    extension = LLLiteNets([net], [Use()])
    prompt = PromptSpec("a cat", width=64, height=64, seed=3, sample_steps=3)
    drawn = [
        pixels(
            generate_guided(
                FAMILY,
                parts,
                replace(prompt, controlnet_image=str(guide_picture(tmp_path / f"{seed}.png", seed, (90, 70)))),
                settings(parts),
                extension,
            )
        )
        for seed in (1, 2)
    ]
    plain = pixels(generate(FAMILY, parts, prompt, settings(parts)))
    net.detach()
    assert np.array_equal(plain, pixels(generate(FAMILY, parts, prompt, settings(parts))))
    assert abs(drawn[0] - plain).max() > 5
    assert abs(drawn[0] - drawn[1]).max() > 1
    missing = replace(prompt, controlnet_image=str(tmp_path / "no.png"))
    with pytest.raises(UserError, match=r"no\.png"):
        generate_guided(FAMILY, parts, missing, settings(parts), extension)
