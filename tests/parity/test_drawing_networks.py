"""Pictures with LoRA files and embeddings equal those of diffusers' pipelines on the same modules and latents."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from library.families.base import ModelParts
from library.generation.embeddings import attach_embeddings
from library.generation.networks import attach_networks
from library.options.generation import PromptOptions
from tests.generation_fixtures import (
    error,
    family_of,
    make_engine,
    make_job,
    options,
    picture,
    toy_model,
    write_network,
)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pipeline(kind: str, parts: ModelParts) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    tokenizers = copy.deepcopy(family_of(kind).tokenizers)
    shared: dict[str, Any] = {
        "vae": parts.vae,
        "unet": parts.unet,
        "text_encoder": parts.text_encoders[0],
        "tokenizer": tokenizers[0],
        "scheduler": EulerDiscreteScheduler(**SCHEDULE),  # type: ignore[arg-type]
    }
    if kind == "sdxl":
        second: dict[str, Any] = {"text_encoder_2": parts.text_encoders[1], "tokenizer_2": tokenizers[1]}
        result: Any = StableDiffusionXLPipeline(**shared, **second, add_watermarker=False)
    else:
        unchecked: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor"))
        result = StableDiffusionPipeline(**shared, **unchecked, requires_safety_checker=False)
    result.set_progress_bar_config(disable=True)
    return result


def theirs(pipe: Any, prompt: str, negative: str = "blurry", **more: Any) -> np.ndarray:
    return pipe(
        prompt,
        negative_prompt=negative,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **more,
    ).images


@pytest.mark.parametrize(("kind", "args"), [("sd1", {}), ("sd1", {"conv_dim": "2"}), ("sd2", {}), ("sdxl", {})])
@pytest.mark.parametrize("way", ["live", "merged"])
def test_lora_draws_diffusers_picture(tmp_path: Path, kind: str, args: dict[str, Any], way: str) -> None:
    pytest.importorskip("peft")
    file = write_network(tmp_path / "net.safetensors", kind, **args)
    engine = make_engine(kind)
    attach_networks(engine, options(network_weights=[file], network_mul=[0.8], network_merge=way == "merged"))
    ours = picture(engine, make_job("a photo of a cat", multipliers=() if way == "merged" else (0.8,)))
    pipe = pipeline(kind, toy_model(kind))
    plain = theirs(pipe, "a photo of a cat")
    pipe.load_lora_weights(str(tmp_path), weight_name="net.safetensors", adapter_name="net")
    pipe.set_adapters(["net"], [0.8])
    expected = theirs(pipe, "a photo of a cat")
    difference = error(ours, expected)
    print(
        f"{kind} {args} {way}: largest difference {difference:.2e}, effect of the network {error(plain, expected):.2f}"
    )
    assert error(plain, expected) > 0.05
    assert difference < 3e-5


def test_two_loras_draw_diffusers_picture(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    files = [write_network(tmp_path / f"net{seed}.safetensors", seed=seed) for seed in (1, 2)]
    engine = make_engine()
    attach_networks(engine, options(network_weights=files))
    ours = picture(engine, make_job("a cat", multipliers=(0.7, -0.4)))
    pipe = pipeline("sd1", toy_model())
    for index, file in enumerate(files):
        pipe.load_lora_weights(str(tmp_path), weight_name=Path(file).name, adapter_name=f"net{index}")
    pipe.set_adapters(["net0", "net1"], [0.7, -0.4])
    difference = error(ours, theirs(pipe, "a cat"))
    print(f"two networks: largest difference {difference:.2e}")
    assert difference < 3e-5


def test_embedding_draws_diffusers_picture(tmp_path: Path) -> None:
    file = tmp_path / "sksx.safetensors"
    save_file({"emb_params": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, file)
    engine = make_engine()
    attach_embeddings(engine, PromptOptions(textual_inversion_embeddings=[str(file)]))
    ours = picture(engine, make_job("a photo of sksx", negative="sksx cat"))
    pipe = pipeline("sd1", toy_model())
    plain = theirs(pipe, "a photo of sksx", "sksx cat")
    pipe.load_textual_inversion(str(file), token="sksx")
    expected = theirs(pipe, "a photo of sksx", "sksx cat")
    difference = error(ours, expected)
    print(f"embedding: largest difference {difference:.2e}, effect {error(plain, expected):.2f}")
    assert error(plain, expected) > 1e-2
    assert difference < 3e-5
