"""CLIP and VGG16 guidance: the loss that is asked for sinks, for every sampler that has it; nothing else changes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from library.families.sd import SdFamily
from library.generation import guidance
from library.generation.app import run
from library.generation.critics import ClipCritic, VggCritic, sphere_distance
from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.generation.guidance import attach_guidance
from library.generation.guides import guide_pictures
from library.log import UserError
from library.options.generation import ControlOptions
from library.options.scripts import GEN_IMG
from tests.control_fixtures import control_settings, guide_picture, toy_engine, toy_job
from tests.text_diffusion_fixtures import toy_parts as fresh_parts
from tests.toy import write_toy_checkpoint

toy_parts = functools.cache(fresh_parts)
CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small CLIP model whose vectors depend on what it gets."""
    torch.manual_seed(0)
    text = {**SIZES, "eos_token_id": 49407, "bos_token_id": 49406}
    model: Any = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8}, projection_dim=16)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "position" not in name:
                weight.copy_(torch.randn(weight.shape) / weight[0].numel() ** 0.5)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> str:
    """VGG16 with two to sixteen channels in torchvision's naming, with layers that are not needed."""
    generator, before = torch.Generator().manual_seed(0), 3
    state: dict[str, Tensor] = {"classifier.0.weight": torch.zeros(1)}
    for layer, channels in zip((0, 2, 5, 7, 10, 12, 14, 17), (8, 8, 8, 8, 16, 16, 16, 16), strict=True):
        state[f"features.{layer}.weight"] = (
            torch.randn(channels, before, 3, 3, generator=generator) / (before * 4) ** 0.5
        )
        state[f"features.{layer}.bias"] = torch.randn(channels, generator=generator) * 0.1
        before = channels
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guide_picture(tmp_path_factory.mktemp("guide") / "guide.png", 3)


def engine_with(family: str = "sd1", prediction: str = "epsilon", **options: Any) -> Engine:
    engine = toy_engine(SdFamily(v2=family == "sd2"), toy_parts(family, prediction))
    attach_guidance(engine, ControlOptions(**options))
    return engine


def seen(pictures_BCHW: Tensor) -> Tensor:
    return (pictures_BCHW / 2 + 0.5).clamp(0, 1)


def losses(clip: str, vgg: str, guide: Path) -> dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]]:
    """By kind: the options that switch it on, and the loss of pictures that should sink."""
    critic, features = ClipCritic(clip, CPU), VggCritic(vgg, 7)
    target = guide_pictures([toy_job(guide)], 0)
    text, like = critic.texts(["a red fox"]), critic.pictures(target, "nearest")
    return {
        "text": (
            {"clip_guidance_scale": 15.0, "clip_guidance_model": clip},
            lambda pictures: sphere_distance(critic.pictures(seen(pictures)), text),
        ),
        "picture": (
            {"clip_image_guidance_scale": 60.0, "clip_guidance_model": clip},
            lambda pictures: sphere_distance(critic.pictures(seen(pictures)), like),
        ),
        "vgg": (
            {"vgg16_guidance_scale": 100.0, "vgg16_guidance_layer": 7, "vgg16_weights": vgg},
            lambda pictures: (features(seen(pictures)) - features(target)).square().mean(dim=(1, 2, 3)),
        ),
    }


@pytest.mark.parametrize(
    ("kind", "sampler", "family", "prediction"),
    [
        ("text", "ddim", "sd1", "epsilon"),
        ("text", "k_lms", "sd1", "epsilon"),
        ("picture", "pndm", "sd1", "epsilon"),
        ("vgg", "lms", "sd1", "epsilon"),
        ("vgg", "ddim", "sd2", "v_prediction"),
        ("picture", "lms", "sd2", "v_prediction"),
    ],
)
def test_the_loss_sinks(
    kind: str, sampler: str, family: str, prediction: str, clip: str, vgg: str, guide: Path
) -> None:
    options, loss = losses(clip, vgg, guide)[kind]
    job = toy_job(guide, prompt="a (red:1.3) fox", sampler=sampler)
    plain = engine_with(family, prediction).draw([job])
    guided = engine_with(family, prediction, **options).draw([job])
    before, after = float(loss(plain).detach()), float(loss(guided).detach())
    print(f"{kind} {sampler} {prediction}: {before:.4f} -> {after:.4f}")
    assert after < 0.97 * before


class Enough(Exception):
    """Nothing has to be drawn."""


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "lms"])
def test_pushes_are_as_long_as_the_formulas_say(
    sampler: str, prediction: str, clip: str, vgg: str, guide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise that is predicted changes by sqrt(1 - ac) g, latents of level sigma by sigma^2 g; here g is 1."""
    monkeypatch.setattr(guidance._Steering, "_direction", lambda _, latents, *__: torch.ones_like(latents))
    options, _ = losses(clip, vgg, guide)["vgg"]
    engine = engine_with("sd1" if prediction == "epsilon" else "sd2", prediction, **options)
    changes: list[tuple[float, Tensor]] = []

    @contextmanager
    def look(setup: Setup) -> Generator[None]:
        timestep, x = setup.sampler.timesteps[1], setup.latents_BCHW
        plain, steered = setup.unet(x, timestep, 1), setup.predict(x, timestep, 1)
        ac = float(engine.settings.schedule.alphas_cumprod_T[int(timestep)])
        if sampler == "ddim":
            share = ac**0.5 if prediction == "v_prediction" else 1.0
            changes.append((-((1 - ac) ** 0.5), share * (steered - plain)))
        else:
            assert torch.equal(steered, plain)
            sigma = float(setup.sampler.scheduler.sigmas[1])
            changes.append((sigma**2, setup.after_step[0](torch.zeros_like(x), 1)))
        raise Enough
        yield

    engine.extensions.append(look)
    with pytest.raises(Enough):
        engine.draw([toy_job(guide, sampler=sampler)])
    ((expected, found),) = changes
    torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-4, rtol=1e-4)


def test_each_picture_has_its_own_loss(clip: str, vgg: str, guide: Path) -> None:
    options, _ = losses(clip, vgg, guide)["vgg"]
    jobs = [toy_job(guide), toy_job(guide, seed=8)]
    both = engine_with(**options).draw(jobs)
    for index, job in enumerate(jobs):
        alone = engine_with(**options).draw([job])
        assert (both[index] - alone[0]).abs().max() < 1e-3


def test_a_text_of_its_own_guides(clip: str) -> None:
    options: dict[str, Any] = {"clip_guidance_scale": 60.0, "clip_guidance_model": clip}
    job = toy_job()
    by_prompt = engine_with(**options).draw([job])
    by_text = engine_with(**options).draw([replace(job, clip_prompt="a green tree in the rain")])
    assert (by_prompt - by_text).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["picture", "vgg"])
def test_without_a_guide_the_first_picture_is_free_and_guides_the_next(
    kind: str, clip: str, vgg: str, guide: Path
) -> None:
    options, _ = losses(clip, vgg, guide)[kind]
    engine, plain = engine_with(**options), engine_with()
    first, second = engine.draw([toy_job()]), engine.draw([toy_job(seed=8, width=72)])
    assert torch.equal(first, plain.draw([toy_job()]))
    assert (second - plain.draw([toy_job(seed=8, width=72)])).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmsolver++", "heun"])
def test_other_samplers_are_refused(sampler: str, clip: str) -> None:
    engine = engine_with(clip_guidance_scale=1.0, clip_guidance_model=clip)
    with pytest.raises(UserError, match=f"ddim, pndm, lms, k_lms only, not with {sampler}"):
        engine.draw([toy_job(sampler=sampler)])


def test_strength_zero_attaches_nothing() -> None:
    engine = toy_engine(SdFamily(), toy_parts())
    attach_guidance(engine, control_settings()[ControlOptions])
    assert (engine.extensions, engine.after_decode) == ([], [])


# ---- the critics


def test_distance_on_the_sphere() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(sphere_distance(a, b), torch.tensor([0.0, 2 * (math.pi / 4) ** 2]))


def test_clip_vectors_are_transformers_own(clip: str) -> None:
    """Marks of emphasis count for nothing, pictures are normalised as CLIP's processor does."""
    critic, model = ClipCritic(clip, CPU), cast(Any, CLIPModel).from_pretrained(clip)
    assert torch.equal(critic.texts(["a (red:1.3) fox"]), critic.texts(["a red fox"]))
    assert critic.texts(["fox " * 200]).shape == (1, 16)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    colors = [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    mean, std = (torch.tensor(values)[:, None, None] for values in colors)
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=(picture - mean) / std).pooler_output
        assert torch.allclose(critic.pictures(picture), F.normalize(wanted, dim=-1), atol=1e-5)


@pytest.mark.parametrize(("layer", "side", "channels"), [(0, 32, 8), (4, 16, 8), (9, 8, 8), (17, 4, 16)])
def test_vgg_layers_are_counted_as_torchvision_counts(vgg: str, layer: int, side: int, channels: int) -> None:
    critic, state = VggCritic(vgg, layer), torch.load(vgg)
    picture = torch.rand(1, 3, 128, 128)
    found = critic(picture)
    assert found.shape == (1, channels, side, side)
    x = F.interpolate(picture, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (x - mean) / std
    for index in range(layer + 1):
        if index in (4, 9, 16):
            x = F.max_pool2d(x, 2)
        elif f"features.{index}.weight" in state:
            x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        else:
            x = x.relu()
    assert torch.allclose(found, x, atol=1e-5)


# ---- command lines

VGG = ("--vgg16_guidance_scale", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (VGG, "needs --vgg16_weights"),
        (
            ("--vgg16_guidance_scale", "1", "--vgg16_weights", "{vgg}", "--vgg16_guidance_layer", "30"),
            "features.19.weight",
        ),
        (("--clip_guidance_scale", "1", "--clip_guidance_model", "{folder}"), "cannot be loaded"),
    ],
)
def test_refusals(tmp_path: Path, vgg: str, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    model = write_toy_checkpoint(tmp_path / "toy.safetensors")
    filled = [word.format(vgg=vgg, folder=tmp_path) for word in arguments]
    assert run(GEN_IMG, ["--ckpt", str(model), "--outdir", str(tmp_path / "out"), "--prompt", "x", *filled]) == 1
    assert message in capsys.readouterr().err
