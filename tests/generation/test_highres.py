"""Highres fix: two stages, three ways from one to the other, and the bundled latent upscaler."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from library.generation.denoise import Setup
from library.generation.highres import load_upscaler, make_stages
from library.generation.jobs import SizeCondition
from library.log import UserError
from library.options.generation import HighresOptions
from library.options.values import argument_list
from library.rng import torch_stream
from tests.generation.engines import CPU, job, pixels, toy_engine, write_picture
from tests.generation.test_from_picture import draw
from tests.toy import write_toy_checkpoint, write_toy_folder
from tools.latent_upscaler import create_upscaler, main, make_network

WAYS: dict[str, dict[str, Any]] = {"pixels": {}, "latents": {"highres_fix_latents_upscaling": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy.safetensors", "sd1")


def options(**more: Any) -> HighresOptions:
    return HighresOptions(highres_fix_scale=0.5, highres_fix_steps=3, **more)


def random_network(seed: int = 0) -> nn.Module:
    """The upscaler's network with weights and statistics that do something."""
    torch.manual_seed(seed)
    network = make_network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    final: Any = network.get_submodule("conv_final")
    nn.init.normal_(final.weight, std=0.02)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("upscaler") / "upscaler.safetensors"
    save_file(random_network().state_dict(), path)
    return str(path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_both_stages(way: str, family: str) -> None:
    engine = toy_engine(family)
    seen: list[Setup] = []

    @contextmanager
    def look(setup: Setup) -> Iterator[None]:
        seen.append(setup)
        yield

    engine.extensions.append(look)
    one = job(7, width=128, height=192, steps=4, strength=0.5, sizes=SizeCondition(200, 100, None, None, 5, None))
    (drawn,) = make_stages(engine, options(**WAYS[way])).draw([one])
    assert (drawn.stage, drawn.batch, drawn.pictures_BCHW.shape) == ("1", [one], (1, 3, 192, 128))
    first, second = seen
    small = first.batch[0].shared
    assert (small.width, small.height, small.steps, first.first_call, first.stage) == (64, 96, 3, 0, 0)
    assert small.sizes == SizeCondition(100, 50, None, None, 3, None)
    assert first.batch[0].seed == 7
    assert (second.batch[0].seed, second.first_call, second.stage) == (8, 2, 1)
    assert second.batch[0].shared == one.shared
    plain = engine.draw([one])
    assert (plain - drawn.pictures_BCHW).abs().mean() > 0.01


@pytest.mark.parametrize(("strength", "first_call"), [(None, 1), (0.4, 3), (1.0, 0)])
def test_the_first_stage_may_have_a_strength_of_its_own(
    tmp_path: Path, strength: float | None, first_call: int
) -> None:
    """Of its 5 steps; the second stage keeps the picture's strength of 0.8."""
    engine = toy_engine()
    seen: list[Setup] = []

    @contextmanager
    def look(setup: Setup) -> Iterator[None]:
        seen.append(setup)
        yield

    engine.extensions.append(look)
    one = job(files={"source": write_picture(tmp_path / "a.png", (128, 128))}, width=128, height=128, strength=0.8)
    chosen = HighresOptions(highres_fix_scale=0.5, highres_fix_steps=5, highres_fix_strength=strength)
    list(make_stages(engine, chosen).draw([one]))
    assert [setup.first_call for setup in seen] == [first_call, 1]


def test_latents_are_enlarged_bilinearly_and_pixels_by_lanczos() -> None:
    engine = toy_engine()
    one = job(width=128, height=128, strength=0.0)  # the second stage takes no step: what it begins from is seen
    small = job(width=64, height=64, steps=3)
    latents = torch.nn.functional.interpolate(engine.draw_latents([small]), (16, 16), mode="bilinear")
    (by_latents,) = make_stages(engine, options(highres_fix_latents_upscaling=True)).draw([one])
    assert torch.allclose(by_latents.pictures_BCHW, engine.decode(latents), atol=1e-5)
    first, last = make_stages(engine, options(highres_fix_save_1st=True)).draw([one])
    eight_bit = ((first.pictures_BCHW[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    large = np.asarray(Image.fromarray(eight_bit).resize((128, 128), Image.Resampling.LANCZOS)).copy()
    mean_std = engine.posterior(torch.from_numpy(large).permute(2, 0, 1)[None].float() / 127.5 - 1)
    latents = engine.sample_posterior(*mean_std, [torch_stream(job().seed + 1, "picture")])
    assert torch.allclose(last.pictures_BCHW, engine.decode(latents), atol=1e-4)  # strides decide how sums are rounded


@pytest.mark.parametrize("latents", [False, True])
def test_the_first_stage_can_be_saved_and_drawn_again(model: Path, tmp_path: Path, latents: bool) -> None:
    more = ["--highres_fix_latents_upscaling"] if latents else []
    both = draw(
        model, tmp_path / "a", "--prompt", "a cat --d 41 --w 128 --h 128", "--highres_fix_scale", "0.5",
        "--highres_fix_steps", "3", "--highres_fix_save_1st", "--sampler", "euler_a", *more,
    )  # fmt: skip
    assert [path.name[17:] for path in both] == ["_0000_41.png", "_1000_41.png"]
    told = [Image.open(path).info for path in both]
    assert [(info["seed"], info["steps"]) for info in told] == [("41", "3"), ("41", "4")]
    assert [pixels(path).shape for path in both] == [(64, 64, 3), (128, 128, 3)]
    (small,) = draw(model, tmp_path / "b", "--from_image", str(both[0]))
    assert np.array_equal(pixels(small), pixels(both[0]))
    again = draw(model, tmp_path / "c", "--from_image", str(both[1]))
    assert np.array_equal(pixels(again[-1]), pixels(both[1]))


def test_a_picture_is_the_same_alone_and_in_a_batch(weights: str) -> None:
    chosen = options(highres_fix_upscaler="tools.latent_upscaler", highres_fix_upscaler_args=f"weights={weights}")
    for way in (options(), chosen):
        stages = make_stages(toy_engine(), way)
        jobs = [job(seed, width=128, height=128, sampler="euler_a") for seed in (1, 2)]
        (both,) = stages.draw(jobs)
        (alone,) = stages.draw(jobs[1:])
        assert torch.allclose(both.pictures_BCHW[1], alone.pictures_BCHW[0], atol=2e-2)  # 8 bit between the stages
        assert not torch.allclose(both.pictures_BCHW[0], alone.pictures_BCHW[0], atol=0.1)


# ---- upscalers


class Doubling:
    """An upscaler of latents that draws from the global generator."""

    def __init__(self, noise: str = "0") -> None:
        self.noise, self.types = float(noise), list[Any]()

    def to(self, where: Any) -> None:
        self.types.append(where)

    def support_latents(self) -> bool:
        return True

    def upscale(self, vae: Any, images: Any, latents: Tensor, dtype: Any, width: int, height: int, *_: int) -> Tensor:
        assert images is None
        large = torch.nn.functional.interpolate(latents, (height // 8, width // 8))
        return large + self.noise * torch.randn(large.shape)


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module: Any = types.ModuleType("my_upscaler")
    module.create_upscaler = Doubling
    monkeypatch.setitem(sys.modules, "my_upscaler", module)
    return module


def test_an_upscaler_of_the_users(plug_in: types.ModuleType) -> None:
    engine = toy_engine()
    stages = make_stages(engine, options(highres_fix_upscaler="my_upscaler", highres_fix_upscaler_args="noise=0.5"))
    assert isinstance(stages.upscaler, Doubling)
    assert stages.upscaler.types == [torch.float32, CPU]
    one = job(width=128, height=128)
    before = torch.random.get_rng_state()
    (first,), (again,) = stages.draw([one]), stages.draw([one])
    assert torch.equal(first.pictures_BCHW, again.pictures_BCHW)  # even if it draws from the global generator
    assert torch.equal(torch.random.get_rng_state(), before)
    (other,) = make_stages(engine, options(highres_fix_upscaler="my_upscaler")).draw([one])
    assert not torch.equal(first.pictures_BCHW, other.pictures_BCHW)


def test_wrong_upscalers_are_told(plug_in: Any, weights: str, tmp_path: Path) -> None:
    def wrong(module: str, arguments: str | None = None) -> str:
        chosen = options(highres_fix_upscaler=module, highres_fix_upscaler_args=arguments)
        with pytest.raises(UserError) as caught:
            load_upscaler(chosen, CPU, torch.float32)
        return str(caught.value)

    assert "cannot be imported" in wrong("no.such.module")
    assert "no function create_upscaler" in wrong("json")
    assert "unexpected keyword" in wrong("my_upscaler", "size=3")
    assert "there is no file" in wrong("tools.latent_upscaler", "weights=none.safetensors")
    state = {**random_network().state_dict(), "conv_final.weight": torch.zeros(8, 64, 1, 1)}
    save_file(state, tmp_path / "other.safetensors")
    assert "conv_final.weight" in wrong("tools.latent_upscaler", f"weights={tmp_path / 'other.safetensors'}")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "not weights of the latent upscaler" in wrong(
        "tools.latent_upscaler", f"weights={tmp_path / 'a.safetensors'}"
    )


def test_arguments() -> None:
    read = lambda text: argument_list(text, "x")  # noqa: E731
    assert read("weights=/a b/c=d.pt; x = 1;") == {"weights": "/a b/c=d.pt", "x": "1"}
    assert read(r'weights="C:\a;b.pt";y=#2') == {"weights": r"C:\a;b.pt", "y": "#2"}
    assert read("") == {}
    for text, said in (("weights", "key=value"), ("=3", "key=value"), ('a="b', "not closed"), ("a=1;a=2", "twice")):
        with pytest.raises(UserError, match=said):
            read(text)


def by_hand(state: dict[str, Tensor], x_BCHW: Tensor) -> Tensor:
    """The network as its description says, in eval mode, from a file's tensors."""
    functional = torch.nn.functional

    def layer(x: Tensor, number: str, block: str = "", pad: int = 1) -> Tensor:
        norm = [state[f"{block}bn{number}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(functional.conv2d(x, state[f"{block}conv{number}.weight"], padding=pad), *norm)

    x = layer(x_BCHW, "1").relu()
    for group in range(5):
        before = x
        for number in range(4 * group + 1, 4 * group + 5):
            block = f"resblock{number}."
            x = (x + layer(layer(x, "1", block).relu(), "2", block)).relu()
        x = x + before
    x = layer(layer(x, "2").relu(), "3")
    return x_BCHW + functional.conv2d(x, state["conv_final.weight"], state["conv_final.bias"])


@pytest.mark.parametrize(("family", "factor"), [("sd1", 0.18215), ("sdxl", 0.13025)])
def test_the_latent_upscaler(family: str, factor: float, weights: str, tmp_path: Path) -> None:
    """Against its description: Lanczos, the VAE's mean, the network in eval mode, the model's own factor."""
    from safetensors.torch import load_file

    vae: Any = toy_engine(family).parts.vae
    path = write_picture(tmp_path / "a.png", (64, 32))
    upscaler = create_upscaler(weights=weights)
    image = Image.open(path)
    found = upscaler.upscale(vae, [image, image], None, torch.float32, 128, 64, 1, 2)
    large = np.asarray(image.resize((128, 64), Image.Resampling.LANCZOS)).astype(np.float32).transpose(2, 0, 1)
    latents = vae.encode(torch.from_numpy(large)[None] / 127.5 - 1).latent_dist.mean
    expected = by_hand(load_file(weights), latents) * factor
    assert found.shape == (2, 4, 8, 16)
    assert torch.allclose(found[:1], expected, atol=1e-4)
    assert torch.allclose(found[1:], expected, atol=1e-4)
    assert not torch.allclose(expected, latents * factor, atol=1e-2)


def test_enlarging_files(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_toy_folder(tmp_path / "model")
    for name, size in (("a.png", (64, 48)), ("b.jpg", (70, 50)), ("c.png", (64, 48))):
        write_picture(tmp_path / name, size)
    command = ["--vae_path", str(model), "--weights", weights, "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--image_pattern", str(tmp_path / "*.*g"), "--debug"]) == 0
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sizes == {
        **{f"{name}_{kind}.png": (128, 96) for name in "ac" for kind in ("upscaled", "lanczos4")},
        **{f"b_{kind}.jpg": (128, 96) for kind in ("upscaled", "lanczos4")},
    }
    assert main([*command, "--image_pattern", str(tmp_path / "*.gif")]) == 1
    assert "no file fits" in capsys.readouterr().err
    (tmp_path / "inner").mkdir()
    write_picture(tmp_path / "inner" / "a.png", (64, 48))
    assert main([*command, "--image_pattern", str(tmp_path / "**" / "a.png")]) == 1
    said = capsys.readouterr().err
    assert "would both be written as a_upscaled.png" in said
    assert str(Path("inner") / "a.png") in said
