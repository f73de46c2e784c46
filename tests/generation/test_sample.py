"""Prompts of prompt files drawn by the engine: with a net after a picture, with words of each layer, texts anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.diffusion.schedule import make_schedule
from library.families.base import ModelParts
from library.families.sdxl import SdxlFamily
from library.generation.control import LLLiteNets, Use, when_guided
from library.generation.denoise import Extension
from library.generation.engine import Engine, EngineSettings
from library.generation.prompts import PromptSpec
from library.generation.sample import draw_sample, sample_job
from library.log import UserError
from library.options import ModelOptions
from networks.lllite import ControlNetLLLite, LLLiteSize
from tests.control_fixtures import guide_picture
from tests.generation_fixtures import make_engine, make_job, picture
from tests.toy import write_toy_checkpoint

FAMILY = SdxlFamily()
LONG = "a (red:1.3) cat, " * 30


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> ModelParts:
    path = write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "xl.safetensors", "sdxl")
    return FAMILY.load(ModelOptions(pretrained_model_name_or_path=str(path)))


def engine_of(parts: ModelParts, *nets: Extension) -> Engine:
    settings = EngineSettings(make_schedule(parts.prediction_type), torch.device("cpu"))
    return Engine(FAMILY, parts, settings, extensions=[when_guided(net) for net in nets])


def drawn(engine: Engine, prompt: PromptSpec) -> np.ndarray:
    return np.asarray(draw_sample(engine, prompt, "euler_a")).astype(int)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_it_is_the_generators_picture(kind: str) -> None:
    prompt = PromptSpec("a (photo:1.2) of a cat", "blurry", 64, 64, seed=3, sample_steps=3, scale=5.0)
    sample = np.asarray(draw_sample(make_engine(kind), prompt, "euler"))
    expected = picture(make_engine(kind), make_job(prompt.prompt))[0]
    assert np.array_equal(sample, (expected * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        (PromptSpec(LONG, "", scale=1.0), 2),
        (PromptSpec("", LONG), 2),
        (PromptSpec("a cat", LONG, scale=1.0), 1),
    ],
    ids=["prompt", "negative", "negative that is not used"],
)
def test_texts_have_the_rows_that_they_need(prompt: PromptSpec, rows: int) -> None:
    assert sample_job(make_engine(), prompt, "ddim").shared.rows == rows


def test_texts_are_encoded_anew_when_the_encoders_changed() -> None:
    engine, prompt = make_engine(), PromptSpec("a cat", "blurry", 64, 64, seed=3, sample_steps=2)
    before = drawn(engine, prompt)
    with torch.no_grad():
        for weight in engine.parts.text_encoders[0].parameters():
            weight.mul_(1.5)
    assert np.array_equal(drawn(engine, prompt), before)
    engine.forget_texts()
    assert abs(drawn(engine, prompt) - before).max() > 1


def test_the_net_follows_its_picture(parts: ModelParts, tmp_path: Path) -> None:
    net: Any = ControlNetLLLite(parts.unet, LLLiteSize(8, 6))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    net.attach()
    engine = engine_of(parts, LLLiteNets([net], [Use()]))
    prompt = PromptSpec("a cat", width=64, height=64, seed=3, sample_steps=3)
    guides = [str(guide_picture(tmp_path / f"{seed}.png", seed, (90, 70))) for seed in (1, 2)]
    one, other = (drawn(engine, replace(prompt, controlnet_image=guide)) for guide in guides)
    plain = drawn(engine, prompt)
    net.detach()
    assert np.array_equal(plain, drawn(engine_of(parts), prompt))
    assert abs(one - plain).max() > 5
    assert abs(one - other).max() > 1
    with pytest.raises(UserError, match=r"no\.png"):
        drawn(engine, replace(prompt, controlnet_image=str(tmp_path / "no.png")))
