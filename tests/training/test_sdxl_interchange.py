"""SDXL files between programs: Diffusers draws our preview with our file, and we its picture with a file of others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.text.tokenizer import clip_tokenizer
from tests.cells_fixtures import Outcome, Runner
from tests.toy import toy_modules, write_toy_folder

PROMPT, NEGATIVE, SEED, STEPS, SCALE = "a sks thing on a table", "blurry, dark", 11, 4, 5.0
WIDTH, HEIGHT = 96, 64
IN_FILE = {"model.diffusion_model.": "lora_unet_", "conditioner.embedders.0.transformer.": "lora_te1_"}
ADAPTED = re.compile(r"\.(transformer_blocks|encoder\.layers)\..*\.weight$|\.proj_(in|out)\.weight$")


@pytest.fixture
def fit(tmp_path, model_sdxl, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sdxl": model_sdxl}, photos, monkeypatch)


@pytest.fixture
def preview(tmp_path) -> tuple[str, ...]:
    """Options for one picture; its sampler is the script's own choice."""
    line = f"{PROMPT} --n {NEGATIVE} --w {WIDTH} --h {HEIGHT} --d {SEED} --s {STEPS} --l {SCALE}"
    (tmp_path / "prompts.txt").write_text(line)
    return "--sample_prompts", str(tmp_path / "prompts.txt")


def pixels(done: Outcome, moment: str) -> np.ndarray:
    """The run's preview of a moment, (64, 96, 3) of 0..255."""
    (picture,) = (done.file.parent / "sample").glob(f"*_{moment}_*.png")
    return np.asarray(Image.open(picture)).astype(float)


def draw_with_diffusers(lora: Path | None) -> np.ndarray:
    """The preview's picture by Diffusers alone, on the same base model."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

    modules = toy_modules("sdxl")
    pipe = StableDiffusionXLPipeline(
        vae=modules["vae"],
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules["text_encoder_2"],
        tokenizer=clip_tokenizer(49407),
        tokenizer_2=clip_tokenizer(0),
        unet=modules["unet"],
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon"
        ),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    picture = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).images[0]
    return (picture * 255).round()


def assert_same_picture(ours: np.ndarray, lora: Path) -> None:
    theirs, base = draw_with_diffusers(lora), draw_with_diffusers(None)
    error, effect = np.abs(ours - theirs).max(), np.abs(theirs - base).mean()
    print(f"largest difference {error:.0f} of 255; the LoRA changes {effect:.1f} on average")
    assert effect > 5
    assert error <= 1


@pytest.mark.parametrize(
    "options",
    [
        ("--network_alpha", "4"),
        ("--network_args", "conv_dim=2", "conv_alpha=2", "block_dims=" + ",".join(["2", "3"] * 9 + ["4"])),
    ],
    ids=["lierla", "c3lier_blocks"],
)
def test_diffusers_draws_our_preview(fit, preview, options):
    pytest.importorskip("peft")
    done = fit(*preview, "--sample_every_n_steps", "3", "--learning_rate", "3e-2", *options)
    assert_same_picture(pixels(done, "000003"), done.file)


def test_we_draw_what_diffusers_draws_with_a_file_of_others(fit, preview, model_sdxl, tmp_path):
    """Names made from the checkpoint's own keys, ranks that differ by layer: the same picture before the first step."""
    pytest.importorskip("peft")
    file = tmp_path / "others.safetensors"
    save_file(reference_lora(model_sdxl), file)
    given = ("--network_weights", str(file), "--dim_from_weights")
    done = fit(*preview, "--sample_at_first", *given, "--learning_rate", "1e-9", steps=1)
    assert_same_picture(pixels(done, "e000000"), file)
    before, after = load_file(file), done.tensors
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)


def reference_lora(model: Path) -> dict[str, torch.Tensor]:
    """A LoRA of every linear layer as the reference names it: the key in the file with underlines for dots.

    One alpha for all: Diffusers mixes up layers where alphas differ.
    """
    layers: dict[str, tuple[int, ...]] = {}
    for key, tensor in load_file(model).items():
        for prefix, name in IN_FILE.items():
            if key.startswith(prefix) and ADAPTED.search(key) and "norm" not in key:
                layer = key.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
                layers[name + layer] = tuple(tensor.shape)
    # the second encoder has the names of the first, although its keys in the file are others; it is twice as wide
    first = {name: shape for name, shape in layers.items() if "_te1_" in name}
    for name, (width_out, width_in) in first.items():
        second = name.replace("_te1_", "_te2_")
        layers |= dict.fromkeys((second, second.replace("_layers_1_", "_layers_2_")), (2 * width_out, 2 * width_in))
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for index, (name, (width_out, width_in)) in enumerate(sorted(layers.items())):
        rank = 2 + index % 3
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, width_in, generator=generator) / width_in**0.5
        tensors[f"{name}.lora_up.weight"] = torch.randn(width_out, rank, generator=generator) * 0.3
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


def test_a_folder_as_base_gives_the_losses_of_the_file(fit, photos, tmp_path, monkeypatch):
    folder = write_toy_folder(tmp_path / "model", "sdxl")
    options = ("--min_snr_gamma", "5", "--max_token_length", "150", "--text_encoder_lr", "1e-3", "5e-4")
    from_file = fit(*options)
    from_folder = Runner(tmp_path / "f", {"sdxl": folder}, photos, monkeypatch)(*options)
    assert from_folder.losses == from_file.losses
    assert from_folder.tensors.keys() == from_file.tensors.keys()
    assert all(torch.equal(tensor, from_file.tensors[key]) for key, tensor in from_folder.tensors.items())


def test_a_file_with_one_text_encoder_goes_on(fit, tmp_path):
    """What was trained without the first encoder does not get one from somewhere."""
    first = fit("--text_encoder_lr", "0", "1e-3", steps=1)
    only_second = {key: tensor for key, tensor in first.tensors.items() if not key.startswith("lora_te1_")}
    save_file(only_second, tmp_path / "part.safetensors")
    done = fit("--network_weights", str(tmp_path / "part.safetensors"), "--dim_from_weights", steps=1)
    assert done.tensors.keys() == only_second.keys()
    assert done.count("lora_te2_") == 18
