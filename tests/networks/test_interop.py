"""Our files in diffusers, files of diffusers here, and third-party networks through the same protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.checkpoint.inspection import check_network_file
from library.plugin import load_network_module
from networks import lora
from tests.networks_fixtures import TextEncoderView, randomise, run_clip, run_unet, toy_models


def pipeline(models: tuple[nn.Module, nn.Module]) -> Any:
    pytest.importorskip("peft")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=models[0],
        tokenizer=None,
        unet=models[1],
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def predictions(models: tuple[nn.Module, nn.Module]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [run_clip(models[0]), run_unet(models[1])]


@pytest.mark.parametrize(
    ("sd2", "args"),
    [(False, {}), (False, {"conv_dim": "2", "conv_alpha": "1"}), (True, {})],
    ids=["lierla", "c3lier", "sd2"],
)
def test_diffusers_reads_our_file(tmp_path: Path, sd2: bool, args: dict[str, str]) -> None:
    models = toy_models(sd2)
    before = predictions(models)
    network = lora.create_network(1.0, 4, 2.0, None, *models, **args)
    network.apply_to(*models)
    randomise(network)
    ours = predictions(models)
    network.save_weights(str(tmp_path / "net.safetensors"), None, None)
    others = toy_models(sd2)
    pipe = pipeline(others)
    pipe.load_lora_weights(str(tmp_path), weight_name="net.safetensors")
    for got, expected, base in zip(predictions((pipe.text_encoder, pipe.unet)), ours, before, strict=True):
        assert (expected - base).abs().max() > 0.05
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_file_written_by_diffusers_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    models = toy_models()
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    models[1].add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=attention))
    models[0].add_adapter(peft.LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "out_proj"]))
    for model in models:
        factors = nn.ParameterDict({n.replace(".", "|"): p for n, p in model.named_parameters() if "lora_" in n})
        randomise(factors)
    theirs = predictions(models)
    layers = {
        "unet_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(models[1])),
        "text_encoder_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(models[0])),
        "unet_lora_adapter_metadata": models[1].peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": models[0].peft_config["default"].to_dict(),
    }
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), weight_name="theirs.safetensors", **layers)
    file = str(tmp_path / "theirs.safetensors")
    ours = toy_models()
    network, _ = lora.create_network_from_weights(1.0, file, None, *ours)
    network.apply_to(*ours)
    report = network.load_weights(file)
    assert report.loaded == len(network.adapters) == 32 * 4 + 2 * 2
    for got, expected in zip(predictions(ours), theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("algo", ["lokr", "loha"])
def test_lycoris_trains_through_the_protocol(tmp_path: Path, algo: str) -> None:
    pytest.importorskip("lycoris")
    module = load_network_module("lycoris.kohya")
    torch.manual_seed(0)
    encoder, unet = toy_models()
    view = TextEncoderView(encoder)
    before = predictions((encoder, unet))
    network = module.create_network(
        1.0, 4, 1.0, None, view, unet, neuron_dropout=None, algo=algo, factor="2", dropout="0.0", preset="attn-mlp"
    )
    network.apply_to(view, unet, True, True)
    names = {key.partition(".")[0] for key in network.state_dict()}
    own = lora.create_network(1.0, 4, 1.0, None, *toy_models())
    # no class was renamed under its feet: it finds the text encoder's layers that we find by path
    assert {name for name in names if name.startswith("lora_te")} == {
        adapter.name for adapter in own.adapters if adapter.name.startswith("lora_te")
    }
    assert sum("_attn" in name for name in names) >= 16 * 8
    for got, expected in zip(predictions((encoder, unet)), before, strict=True):
        torch.testing.assert_close(got, expected)
    groups = network.prepare_optimizer_params(1e-2, 1e-2, 1e-2)
    groups = groups[0] if isinstance(groups, tuple) else groups
    network.prepare_grad_etc(view, unet)
    network.on_epoch_start(view, unet)
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        (run_unet(unet).square().mean() + run_clip(encoder).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = predictions((encoder, unet))
    assert not any(torch.equal(a, b) for a, b in zip(trained, before, strict=True))
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, torch.float32, {"ss_network_module": "lycoris.kohya"})
    check = check_network_file(file)
    assert check.modules == len(names)
    assert not check.not_finite
    fresh_encoder, fresh_unet = toy_models()
    fresh_view = TextEncoderView(fresh_encoder)
    fresh, weights = module.create_network_from_weights(1.0, file, None, fresh_view, fresh_unet)
    fresh.apply_to(fresh_view, fresh_unet, True, True)
    fresh.load_state_dict(weights, strict=False)
    for got, expected in zip(predictions((fresh_encoder, fresh_unet)), trained, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
