"""What train_controlnet.py writes, what its previews show, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from library.families.sd import SdFamily
from library.generation.app import run as draw
from library.models.build import canonical_state
from library.models.control import empty_control, load_control, save_control_file, save_control_folder
from library.models.load import Target
from library.options import ModelOptions
from library.options.scripts import GEN_IMG
from tests.control_fixtures import toy_control
from tests.lllite_fixtures import TWO_STEPS, Pairs, control, refusal, same
from tests.text_diffusion_fixtures import diffusers_pipeline
from tests.toy import toy_spec
from tests.training.runs import CONTROL_SCRIPT, metadata, tensors, train

FLOAT = Target(torch.float32)
DIFFUSERS: Any = diffusers  # its classes' annotations are wrong in places
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
SMALL_PICTURE = "--steps 2 --W 64 --H 64 --scale 7.5 --sampler ddim --seed 1"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the toy SD1 that does something."""
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_control_file(path, toy_control(), toy_spec().unet)
    return path


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def drawn(model: Path, net: Path, guide: Path, out: Path, prompt: str) -> np.ndarray:
    words = ["--ckpt", str(model), "--prompt", prompt, "--outdir", str(out), *SMALL_PICTURE.split()]
    assert draw(GEN_IMG, [*words, "--control_net_models", str(net), "--guide_image_path", str(guide)]) == 0
    return picture(next(out.glob("*.png")))


# ---- files


def test_preview_generator_and_diffusers_draw_the_same(model: Path, pairs: Pairs, net: Path, tmp_path: Path) -> None:
    """With the folder that was written, and the file; and a preview leaves the training as it was."""
    guide, other = sorted(pairs.edges.iterdir())[:2]
    prompts = tmp_path / "prompts.txt"
    line = "a photo of a cat --n blurry --d 3 --s 4 --w 64 --h 64 --l 5"
    prompts.write_text(f"{line} --cn {guide}\n{line} --cn {other}\n{line}\n")
    shared = ("--controlnet_model_name_or_path", str(net), *TWO_STEPS)
    drawing = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_at_first")
    plain = control(model, pairs, tmp_path / "plain", *shared)
    file = control(model, pairs, tmp_path / "file", *shared, *drawing)
    assert same(plain, file)
    at_first, after_two_steps = (
        [picture(path) for path in sorted((tmp_path / "file" / "sample").glob(f"toy_{moment}_*.png"))]
        for moment in ("e000000", "000002")
    )
    after_one, after_two, without = after_two_steps
    assert np.array_equal(at_first[2], without)
    assert not np.array_equal(at_first[0], after_one)
    assert abs(after_one - without).max() > 5
    assert abs(after_one - after_two).max() > 1

    control(model, pairs, tmp_path / "folder", *shared, "--save_model_as", "diffusers")
    folder = tmp_path / "folder" / "toy"
    theirs = DIFFUSERS.ControlNetModel.from_pretrained(folder)
    parts = SdFamily().load(ModelOptions(pretrained_model_name_or_path=str(model)))
    ours = canonical_state(load_control(file, parts.spec.unet, FLOAT))
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())
    pipeline = DIFFUSERS.StableDiffusionControlNetPipeline(
        **diffusers_pipeline(parts, DIFFUSERS.DDIMScheduler(**SCHEDULER)).components,
        controlnet=theirs,
        requires_safety_checker=False,
    )
    image = pipeline(
        "a photo of a cat",
        negative_prompt="blurry",
        image=Image.open(guide).convert("RGB"),
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    assert abs(image * 255 - after_one).max() < 2


@pytest.mark.parametrize("form", ["safetensors", "pt", "diffusers"])
def test_every_form_draws_and_is_a_beginning(form: str, model: Path, pairs: Pairs, net: Path, tmp_path: Path) -> None:
    shared = ("--max_train_steps", "1", "--save_model_as", form, "--save_precision", "fp16")
    control(model, pairs, tmp_path, "--controlnet_model_name_or_path", str(net), *shared, "--save_every_n_epochs", "1")
    written = tmp_path / ("toy" if form == "diffusers" else f"toy.{form}")
    pictures = [
        drawn(model, written, guide, tmp_path / guide.stem, "a thing") for guide in sorted(pairs.edges.iterdir())[:2]
    ]
    assert abs(pictures[0] - pictures[1]).max() > 1
    still = ("--max_train_steps", "1", "--optimizer_type", "SGD", "--learning_rate", "1e-30")
    again = control(model, pairs, tmp_path / "again", "--controlnet_model_name_or_path", str(written), *still)
    begun = canonical_state(load_control(written, toy_spec().unet, FLOAT))
    kept = canonical_state(load_control(again, toy_spec().unet, FLOAT))
    assert all(torch.equal(kept[key], begun[key]) for key in begun)


def test_names_and_metadata(model: Path, pairs: Pairs, net: Path, tmp_path: Path) -> None:
    file = control(model, pairs, tmp_path, "--controlnet_model_name_or_path", str(net), *TWO_STEPS)
    facts = metadata(file)
    assert facts["modelspec.architecture"] == "stable-diffusion-v1/control-net"
    assert (facts["modelspec.title"], facts["ss_steps"], facts["ss_seed"]) == ("toy", "2", "7")
    found = tensors(file)
    assert found.keys() == tensors(net).keys()
    assert {"control_model.zero_convs.11.0.weight", "control_model.input_hint_block.0.weight"} <= found.keys()


def test_nets_that_take_bgr_are_turned_round(model: Path, pairs: Pairs, tmp_path: Path) -> None:
    """An original file cannot say so, and would be used with red and blue exchanged."""
    net = toy_control()
    save_control_file(tmp_path / "rgb.safetensors", net, toy_spec().unet)
    net.register_to_config(controlnet_conditioning_channel_order="bgr")
    kernel = net.controlnet_cond_embedding.conv_in.weight
    kernel.data = kernel.data.flip(1)
    save_control_folder(tmp_path / "bgr", net)
    one, other = (
        control(
            model, pairs, tmp_path / f"out {name}", "--controlnet_model_name_or_path", str(tmp_path / name), *TWO_STEPS
        )
        for name in ("rgb.safetensors", "bgr")
    )
    assert same(one, other)


def test_small_nets_of_sdxl_learn_too(model_sdxl: Path, pairs: Pairs, tmp_path: Path) -> None:
    """They have fewer transformer blocks than the U-Net, so their files cannot have its names."""
    config = {**dict(toy_control("sdxl").config), "down_block_types": ("DownBlock2D",) * 3}
    config["mid_block_type"] = "UNetMidBlock2D"
    small = empty_control(config).to_empty(device="cpu")
    with torch.no_grad():
        for weight in small.parameters():
            weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(weight.numel()))
    save_control_folder(tmp_path / "small", small)
    start = ("--controlnet_model_name_or_path", str(tmp_path / "small"), "--sdxl", *TWO_STEPS)
    file = control(model_sdxl, pairs, tmp_path / "out", *start)
    after = load_control(file, toy_spec("sdxl").unet, FLOAT).state_dict()
    assert after.keys() == small.state_dict().keys()
    assert any(not torch.equal(after[key], value) for key, value in small.state_dict().items())


def test_the_plan_of_a_run(model: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--conditioning_data_dir", str(pairs.edges), "--dry_run")
    assert train(model, pairs.images, tmp_path, *words, script=CONTROL_SCRIPT) == 0
    said = capsys.readouterr().out
    assert f"after pictures of {pairs.edges}" in said
    size = 4 * sum(value.numel() for value in toy_control().state_dict().values()) / 1e6
    assert f"models: {size:,.1f} MB" in said


# ---- bad input


def test_nets_that_cannot_be_begun_with(
    model: Path, model_sdxl: Path, pairs: Pairs, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(base: Path, *options: str) -> str:
        folder = ("--conditioning_data_dir", str(pairs.edges), *options)
        return refusal(base, pairs, tmp_path, capsys, *folder, script=CONTROL_SCRIPT)

    start = "--controlnet_model_name_or_path"
    assert "there is no such file or folder" in said(model, start, "nowhere.safetensors")
    assert "holds no ControlNet" in said(model, start, str(model))
    assert "is a ControlNet for another" in said(model_sdxl, "--sdxl", start, str(other_kind(tmp_path)))
    assert "--sdxl" in said(model_sdxl)
    assert "leave out --sdxl" in said(model, "--sdxl")
    assert "--v2 is for SD 2.x models" in said(model, "--sdxl", "--v2")
    assert "--cache_text_encoder_outputs is for SDXL" in said(model, "--cache_text_encoder_outputs")
    assert "nothing to train" in said(model, "--learning_rate", "0")


def other_kind(folder: Path) -> Path:
    save_control_folder(folder / "sd1", toy_control())
    return folder / "sd1"
