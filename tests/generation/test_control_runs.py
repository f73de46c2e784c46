"""ControlNets in generation: guide pictures, ratios, sizes that change, refusals; nothing leaks between pictures."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.families.sd import SdFamily
from library.generation.app import run
from library.generation.control import ControlNets, Use, attach_control, uses_of
from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.log import UserError
from library.models.control import save_control_file
from library.options.generation import ControlOptions
from library.options.scripts import GEN_IMG
from tests.control_fixtures import control_settings, guide_picture, toy_control, toy_engine, toy_job
from tests.text_diffusion_fixtures import toy_parts as fresh_parts
from tests.toy import toy_spec, write_toy_checkpoint

toy_parts = functools.cache(fresh_parts)
SHORT = ("--steps", "3", "--sampler", "euler_a", "--W", "64", "--H", "64", "--scale", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy.safetensors", "sd1")


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("nets")
    for seed in (1, 2):
        save_control_file(folder / f"net{seed}.safetensors", toy_control(seed=seed), toy_spec().unet)
    return [str(folder / f"net{seed}.safetensors") for seed in (1, 2)]


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("guides")
    return [guide_picture(folder / f"{name}.png", seed, (70, 50)) for seed, name in enumerate("abc")]


def engine_with(*arguments: str) -> Engine:
    engine = toy_engine(SdFamily(), toy_parts())
    attach_control(engine, control_settings(*arguments))
    return engine


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_ratio_is_the_share_of_the_steps(nets: list[str], guides: list[Path]) -> None:
    """4 steps: step i is the net's while i / 4 <= ratio."""
    calls: list[bool] = []

    def count(setup: Setup) -> Any:
        inner = setup.unet.residuals
        assert inner is not None

        def residuals(*arguments: Any) -> Any:
            found = inner(*arguments)
            calls.append(found is not None)
            return found

        setup.unet.residuals = cast(Any, residuals)
        return nullcontext()

    for ratio, wanted in (("0", [1, 0, 0, 0]), ("0.5", [1, 1, 1, 0]), ("0.49", [1, 1, 0, 0]), ("1", [1, 1, 1, 1])):
        engine = engine_with("--control_net_models", nets[0], "--control_net_ratios", ratio)
        engine.extensions.append(count)
        calls.clear()
        engine.draw([toy_job(guides[0])])
        assert calls == wanted, ratio


def test_the_guide_block_runs_once_for_a_batch(guides: list[Path]) -> None:
    engine, net, shapes = toy_engine(SdFamily(), toy_parts()), toy_control(), list[tuple[int, ...]]()
    net.controlnet_cond_embedding.register_forward_hook(lambda _, args, output: shapes.append(tuple(args[0].shape)))
    engine.extensions.append(ControlNets(engine.family, [net], [Use()]))
    engine.draw([toy_job(guides[0]), toy_job(guides[1], seed=4)])
    assert shapes == [(2, 3, 64, 64)]


def test_a_net_that_wants_bgr_gets_it(guides: list[Path]) -> None:
    def drawn(order: str, flip: bool) -> Tensor:
        engine, net = toy_engine(SdFamily(), toy_parts()), toy_control()
        net.register_to_config(controlnet_conditioning_channel_order=order)
        if flip:
            kernel = net.controlnet_cond_embedding.conv_in.weight
            kernel.data = kernel.data.flip(1)
        engine.extensions.append(ControlNets(engine.family, [net], [Use()]))
        return engine.draw([toy_job(guides[0])])

    assert distance(drawn("bgr", flip=True), drawn("rgb", flip=False)) < 1e-5
    assert distance(drawn("bgr", flip=False), drawn("rgb", flip=False)) > 1e-3


def test_pictures_alone_and_in_a_batch(nets: list[str], guides: list[Path]) -> None:
    engine = engine_with("--control_net_models", nets[0], "--control_net_preps", "canny_20_60")
    both = engine.draw([toy_job(guides[0]), toy_job(guides[1], seed=4)])
    alone = engine.draw([toy_job(guides[1], seed=4)])
    other = engine.draw([toy_job(guides[0], seed=4)])
    assert distance(both[1:], alone) < 1e-4
    assert distance(other, alone) > 0.02


@pytest.mark.parametrize(("scale", "negative"), [(1.0, None), (5.0, None), (5.0, 2.0)])
def test_all_kinds_of_guidance(nets: list[str], guides: list[Path], scale: float, negative: float | None) -> None:
    shared: dict[str, Any] = {"scale": scale, "negative_scale": negative}
    engine = engine_with("--control_net_models", nets[0])
    plain = toy_engine(SdFamily(), toy_parts()).draw([toy_job(**shared)])
    assert distance(engine.draw([toy_job(guides[0], **shared)]), plain) > 0.02
    assert distance(engine.draw([toy_job(**shared)]), plain) == 0  # a job without guides: nothing of the net is left


def test_strength_zero_is_no_net(nets: list[str], guides: list[Path]) -> None:
    engine = engine_with("--control_net_models", nets[0], "--control_net_multipliers", "0")
    plain = toy_engine(SdFamily(), toy_parts()).draw([toy_job()])
    assert distance(engine.draw([toy_job(guides[0])]), plain) == 0


def test_guides_follow_latents_of_other_sizes(nets: list[str], guides: list[Path]) -> None:
    """As where latents begin small and grow: the guide is read at the size of the moment."""
    engine = engine_with("--control_net_models", nets[0])
    setups: list[Setup] = []

    def keep(setup: Setup) -> Any:
        setups.append(setup)
        residuals = setup.unet.residuals
        assert residuals is not None
        for size in (4, 8):
            input_BCHW = torch.zeros(2, 4, size, size)
            found = residuals(input_BCHW, torch.full((2,), 500), setup.unet.condition, setup.unet.geometry, 0)
            assert found is not None
            assert found.skips[0].shape[-2:] == (size, size)
        return nullcontext()

    engine.extensions.append(keep)
    engine.draw([toy_job(guides[0])])
    assert setups


def test_second_stage_without_net(nets: list[str], guides: list[Path]) -> None:
    def residuals_in_stage(stage: int, *more: str) -> bool:
        engine, seen = engine_with("--control_net_models", nets[0], *more), list[bool]()
        first, own = engine.extensions, toy_job(guides[0])

        def enter(setup: Setup) -> Any:
            setup.stage = stage
            context = first[0](setup)
            with context:
                seen.append(setup.unet.residuals is not None)
            return nullcontext()

        engine.extensions = [enter]
        engine.draw([own])
        return seen[0]

    assert residuals_in_stage(1)
    assert residuals_in_stage(0, "--highres_fix_disable_control_net")
    assert not residuals_in_stage(1, "--highres_fix_disable_control_net")


# ---- command lines


def draw(model: Path, out: Path, *more: str, status: int = 0) -> list[Path]:
    assert run(GEN_IMG, ["--ckpt", str(model), "--outdir", str(out), *SHORT, "--seed", "5", *more]) == status
    return sorted(out.glob("*.png"))


def test_each_picture_has_its_own_guides(model: Path, nets: list[str], guides: list[Path], tmp_path: Path) -> None:
    folder = guides[0].parent
    two = ("--control_net_models", *nets, "--prompt", "x --d 1", "--sequential_file_name")
    made = draw(
        model, tmp_path / "a", *two, "--guide_image_path", str(folder), str(guides[0]), "--images_per_prompt", "2"
    )
    # pictures of the folder and the single one: (a, b), (c, a)
    again = draw(model, tmp_path / "b", *two, "--guide_image_path", str(guides[2]), str(guides[0]))
    other = draw(model, tmp_path / "c", *two, "--guide_image_path", str(guides[0]), str(guides[2]))
    assert np.array_equal(pixels(made[1]), pixels(again[0]))
    assert abs(pixels(made[1]) - pixels(other[0])).max() > 2


def test_a_controlled_picture_is_repeated(
    model: Path, nets: list[str], guides: list[Path], tmp_path: Path, capsys: Any
) -> None:
    words = ("--control_net_models", nets[0], "--control_net_preps", "canny", "--control_net_weights", "0.8")
    first = draw(model, tmp_path / "a", *words, "--guide_image_path", str(guides[0]), "--prompt", "x")
    named = ("--from_image", str(first[0]), "--control_net_models", nets[0])  # pictures name no folders
    again = draw(model, tmp_path / "b", *named, "--guide_image_path", str(guides[0]))
    assert np.array_equal(pixels(first[0]), pixels(again[0]))
    draw(model, tmp_path / "c", *named, status=1)
    assert "name it with --guide_image_path" in capsys.readouterr().err


LARGE = {
    "deep shrink": ("--ds_depth_1", "1", "--ds_timesteps_1", "300"),
    "gradual latent": ("--gradual_latent_timesteps", "900", "--steps", "8", "--W", "128", "--H", "128"),
    "highres": ("--highres_fix_scale", "0.5", "--highres_fix_steps", "3", "--W", "128", "--H", "128"),
}


@pytest.mark.parametrize("method", LARGE)
def test_nets_act_in_the_methods_for_large_pictures(
    method: str, model: Path, nets: list[str], guides: list[Path], tmp_path: Path
) -> None:
    words = ("--prompt", "x", *LARGE[method])
    control = ("--control_net_models", nets[0], "--guide_image_path", str(guides[0]))
    plain, guided = draw(model, tmp_path / "plain", *words), draw(model, tmp_path / "net", *words, *control)
    assert pixels(guided[0]).shape == pixels(plain[0]).shape
    assert abs(pixels(guided[0]) - pixels(plain[0])).max() > 5
    if method == "highres":
        half = draw(model, tmp_path / "half", *words, *control, "--highres_fix_disable_control_net")
        assert abs(pixels(half[0]) - pixels(plain[0])).max() > 2
        assert abs(pixels(half[0]) - pixels(guided[0])).max() > 2


NET, GUIDE = ("--control_net_models", "{net}"), ("--guide_image_path", "{guide}")
LLLITE = ("--control_net_lllite_models", "{net}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (NET, "0 pictures for 1 ControlNets"),
        ((*NET, "{net}", *GUIDE), "1 pictures for 2 ControlNets"),
        ((*NET, *GUIDE, "--control_net_preps", "x"), "x: there is no"),
        (("--control_net_models", "none.pth", *GUIDE), "none.pth: there is no such file"),
        ((*NET, *LLLITE, *GUIDE), "cannot be used together"),
        ((*LLLITE, *GUIDE), "no ControlNet-LLLite weights"),
        ((*NET, *GUIDE, "--control_net_ratios", "1", "1"), "2 values"),
    ],
)
def test_refusals(
    model: Path, nets: list[str], guides: list[Path], tmp_path: Path, capsys: Any, arguments: tuple[str], message: str
) -> None:
    filled = [word.format(net=nets[0], guide=guides[0]) for word in arguments]
    draw(model, tmp_path, "--prompt", "x", *filled, status=1)
    assert message in capsys.readouterr().err


def test_too_many_values_are_told() -> None:
    options = ControlOptions(control_net_multipliers=[1.0, 2.0], control_net_ratios=[0.5])
    assert [(use.multiplier, use.ratio) for use in uses_of(options, 2)] == [(1.0, 0.5), (2.0, 1.0)]
    with pytest.raises(UserError, match="2 values for 1 nets"):
        uses_of(options, 1)
