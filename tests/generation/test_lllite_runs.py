"""ControlNet-LLLite in runs of gen_img.py: a picture for each net, ratios, strengths; nothing leaks."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.families.base import ModelParts
from library.families.sdxl import SdxlFamily
from library.generation.app import run
from library.generation.control import LLLiteNets, Use, attach_control
from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.options import ModelOptions
from library.options.scripts import GEN_IMG
from networks.lllite import ControlNetLLLite, LLLiteSize, load_lllite
from tests.control_fixtures import control_settings, guide_picture, toy_engine, toy_job
from tests.toy import toy_modules, write_toy_checkpoint

FAMILY = SdxlFamily()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "xl.safetensors", "sdxl")


@pytest.fixture
def parts(model: Path) -> ModelParts:
    return FAMILY.load(ModelOptions(pretrained_model_name_or_path=str(model)))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("nets")
    for seed in (1, 2):
        made = ControlNetLLLite(toy_modules("sdxl")["unet"], LLLiteSize(8, 6))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in made.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        made.save_weights(folder / f"{seed}.safetensors")
    return [str(folder / f"{seed}.safetensors") for seed in (1, 2)]


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("guides")
    return [guide_picture(folder / f"{name}.png", seed, (70, 50)) for seed, name in enumerate("abc")]


def engine_with(parts: ModelParts, *arguments: str) -> Engine:
    engine = toy_engine(FAMILY, parts)
    attach_control(engine, control_settings("--control_net_lllite_models", *arguments))
    return engine


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_it_acts_where_there_is_a_guide_only(parts: ModelParts, nets: list[str], guides: list[Path]) -> None:
    plain = toy_engine(FAMILY, parts).draw([toy_job()])
    engine = engine_with(parts, nets[0])
    guided = engine.draw([toy_job(guides[0])])
    assert distance(guided, plain) > 0.02
    assert distance(engine.draw([toy_job(guides[1])]), guided) > 1e-3
    assert distance(engine.draw([toy_job()]), plain) == 0


def test_each_net_sees_its_own_picture_from_black_to_white(tmp_path: Path) -> None:
    """-1 is black and 1 is white, as in training; afterwards there is no picture."""
    files = [tmp_path / "black.png", tmp_path / "white.png"]
    for file, colour in zip(files, ("black", "white"), strict=True):
        Image.new("RGB", (64, 64), colour).save(file)
    told: dict[str, list[Any]] = {"first": [], "second": []}
    made: Any = [SimpleNamespace(multiplier=1.0, set_condition=pictures.append) for pictures in told.values()]
    setup: Any = SimpleNamespace(batch=[toy_job(*files)], predict=None)
    with LLLiteNets(made, [Use(), Use()])(setup):
        assert [pictures[0].unique().tolist() for pictures in told.values()] == [[-1.0], [1.0]]
    assert [pictures[1:] for pictures in told.values()] == [[None], [None]]


def test_pictures_alone_and_in_a_batch(parts: ModelParts, nets: list[str], guides: list[Path]) -> None:
    engine = engine_with(parts, *nets)
    one, two = toy_job(guides[0], guides[1]), toy_job(guides[2], guides[0], seed=4)
    both = engine.draw([one, two])
    assert distance(both[:1], engine.draw([one])) < 1e-4
    assert distance(both[1:], engine.draw([two])) < 1e-4
    swapped = toy_job(guides[1], guides[0])  # each net its own picture
    assert distance(engine.draw([swapped]), engine.draw([one])) > 1e-3


def test_ratio_and_strength(parts: ModelParts, nets: list[str], guides: list[Path]) -> None:
    strengths: list[tuple[float, ...]] = []
    loaded = [load_lllite(net, parts.unet) for net in nets]

    def watch(setup: Setup) -> Any:
        inner = setup.predict

        def predict(*arguments: Any) -> Tensor:
            result = inner(*arguments)
            strengths.append(tuple(net.multiplier for net in loaded))
            return result

        setup.predict = predict
        return nullcontext()

    engine = toy_engine(FAMILY, parts)
    engine.extensions = [LLLiteNets(loaded, [Use(0.8, 0.25), Use(0.5)]), watch]
    engine.draw([toy_job(guides[0], guides[1])])
    assert strengths == [(0.8, 0.5), (0.8, 0.5), (0.0, 0.5), (0.0, 0.5)]


@pytest.mark.parametrize(
    "method",
    [
        ("--ds_depth_1", "3", "--ds_timesteps_1", "300"),
        ("--gradual_latent_timesteps", "900", "--sampler", "euler_a", "--steps", "6"),
        ("--highres_fix_scale", "0.5", "--highres_fix_steps", "2"),
    ],
    ids=["deep shrink", "gradual latent", "highres"],
)
def test_it_acts_in_the_methods_for_large_pictures(
    method: tuple[str, ...], model: Path, nets: list[str], guides: list[Path], tmp_path: Path
) -> None:
    words = ["--ckpt", str(model), "--steps", "2", "--W", "128", "--H", "128", "--prompt", "x", "--seed", "1", *method]
    control = ("--control_net_lllite_models", nets[0], "--guide_image_path", str(guides[0]))
    found: list[np.ndarray] = []
    for name, more in (("plain", ()), ("net", control)):
        assert run(GEN_IMG, [*words, "--outdir", str(tmp_path / name), *more]) == 0
        with Image.open(next((tmp_path / name).glob("*.png"))) as picture:
            found.append(np.asarray(picture).astype(int))
    assert abs(found[0] - found[1]).max() > 5


def test_a_whole_run(model: Path, nets: list[str], guides: list[Path], tmp_path: Path) -> None:
    words = ["--ckpt", str(model), "--steps", "2", "--W", "64", "--H", "64", "--prompt", "x", "--seed", "1"]

    def pixels(name: str, *more: str) -> np.ndarray:
        assert run(GEN_IMG, [*words, "--outdir", str(tmp_path / name), *more]) == 0
        with Image.open(next((tmp_path / name).glob("*.png"))) as picture:
            return np.asarray(picture).astype(int)

    with_net = pixels("net", "--control_net_lllite_models", nets[0], "--guide_image_path", str(guides[0]))
    off = ("--control_net_multipliers", "0")
    without = pixels("off", "--control_net_lllite_models", nets[0], "--guide_image_path", str(guides[0]), *off)
    assert abs(with_net - without).max() > 3
    assert np.array_equal(without, pixels("plain"))
