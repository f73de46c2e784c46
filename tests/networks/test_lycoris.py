"""LoHa, LoKr, DoRA and Tucker files of LyCORIS and PEFT here, and ours there; training and drawing with each module."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.checkpoint.inspection import check_network_file
from library.plugin import load_network_module
from networks import loha, lokr, lora
from networks.products import divisors_near
from networks.weights import to_weight_table
from tests.networks_fixtures import (
    TextEncoderView,
    randomise,
    run_clip,
    run_sdxl_unet,
    run_unet,
    toy_models,
    toy_sdxl_models,
)

MODULES: dict[str, Any] = {"lora": lora, "loha": loha, "lokr": lokr}
# Its own preset "full", which finds the layers of the time embedding twice and gives up.
FULL: dict[str, Any] = {
    "enable_conv": True,
    "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "unet_target_name": ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"],
    "text_encoder_target_module": ["CLIPAttention", "CLIPMLP"],
    "text_encoder_target_name": [],
}
CONV = {"conv_dim": "4", "conv_alpha": "2"}
# name: (algorithm, arguments that both programs know)
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "loha": ("loha", {}),
    "loha tucker": ("loha", {"use_tucker": "True"}),
    "lokr": ("lokr", {"factor": "2"}),
    "lokr even, both thin": ("lokr", {"decompose_both": "True"}),
    "lokr whole": ("lokr", {"full_matrix": "True"}),
    "lokr tucker": ("lokr", {"factor": "2", "use_tucker": "True"}),
    "lora tucker": ("lora", {"use_tucker": "True"}),
    "dora": ("lora", {"dora_wd": "True"}),
    "dora per input": ("lora", {"dora_wd": "True", "wd_on_output": "False"}),
    "dora loha": ("loha", {"dora_wd": "True"}),
    "dora lokr tucker": ("lokr", {"dora_wd": "True", "factor": "4", "use_tucker": "True"}),
}
# Files of its own that it can write but not build a network from: it takes the rank from the wrong side of a Tucker
# core's tensors, and has magnitudes per output only.
NOT_BUILT_FROM_FILES = ("dora lokr tucker", "dora per input")


def predictions(models: Sequence[nn.Module]) -> list[Tensor]:
    with torch.no_grad():
        return [run_clip(models[0]), run_unet(models[1])]


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of float32 in another order of products: 1e-6 to 9e-6 of the largest over 60 seeds."""
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 2e-5, f"{error:.1e} of the largest value"


def theirs(models: Sequence[nn.Module], algorithm: str, args: dict[str, str], preset: Path) -> Any:
    toml = pytest.importorskip("toml")
    module = load_network_module("lycoris.kohya")
    preset.write_text(toml.dumps(FULL))
    given = {"algo": algorithm, "dropout": "0.0", "preset": str(preset), **CONV, **args}
    torch.manual_seed(0)
    view = TextEncoderView(models[0])
    network = module.create_network(1.0, 4, 2.0, None, view, models[1], neuron_dropout=None, **given)
    network.apply_to(view, models[1], True, True)
    return network


def two_steps(models: Sequence[nn.Module], network: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(2):
        (run_unet(models[1]).square().mean() + run_clip(models[0]).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("form", list(FORMS))
def test_files_that_lycoris_trained_give_the_same_predictions_here(tmp_path: Path, form: str) -> None:
    pytest.importorskip("lycoris")
    algorithm, args = FORMS[form]
    models = toy_models(layers=1)
    before = predictions(models)
    network = theirs(models, algorithm, args, tmp_path / "full.toml")
    network.requires_grad_(True)
    two_steps(models, network)
    trained = predictions(models)
    file = str(tmp_path / "theirs.safetensors")
    network.save_weights(file, torch.float32, {"ss_network_module": "lycoris.kohya"})

    ours = toy_models(layers=1)
    built, _ = lora.create_network_from_weights(1.0, file, None, *ours)
    built.apply_to(*ours)
    assert built.load_weights(file).loaded == len(built.adapters)
    for got, expected, base in zip(predictions(ours), trained, before, strict=True):
        assert (expected - base).abs().max() > 0.01
        assert_same(got, expected)
    # merged into the weights it is the same too
    merged_into = toy_models(layers=1)
    again, weights = MODULES[algorithm].create_network_from_weights(1.0, file, None, *merged_into, for_inference=True)
    again.merge_to(*merged_into, weights)
    for got, expected in zip(predictions(merged_into), trained, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("form", ["loha tucker", "lokr even, both thin", "dora", "dora lokr tucker", "dora per input"])
def test_files_trained_here_give_the_same_predictions_in_lycoris(tmp_path: Path, form: str) -> None:
    pytest.importorskip("lycoris")
    algorithm, args = FORMS[form]
    models = toy_models(layers=1)
    network = MODULES[algorithm].create_network(1.0, 4, 2.0, None, *models, **args, **CONV)
    network.apply_to(*models)
    before = predictions(models)
    assert all(torch.equal(a, b) for a, b in zip(before, predictions(toy_models(layers=1)), strict=True))
    network.prepare_grad_etc(*models)
    two_steps(models, network)
    trained = predictions(models)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(trained, before, strict=True))
    file = tmp_path / "ours.safetensors"
    network.save_weights(str(file), None, None)
    check = check_network_file(file, MODULES[algorithm].inspect_weights)
    assert check.modules == len(network.adapters)
    assert not check.problems
    assert (check.unmeasured == 0) == ("dora_wd" not in args)

    others = toy_models(layers=1)
    if form in NOT_BUILT_FROM_FILES:
        other, weights = theirs(others, algorithm, args, tmp_path / "full.toml"), load_file(file)
    else:
        module, view = load_network_module("lycoris.kohya"), TextEncoderView(others[0])
        module.LycorisNetworkKohya.apply_preset(FULL)  # it holds for the whole process
        other, weights = module.create_network_from_weights(1.0, str(file), None, view, others[1])
        other.apply_to(view, others[1], True, True)
    other.load_state_dict(weights, strict=False)
    for got, expected in zip(predictions(others), trained, strict=True):
        assert_same(got, expected)


def test_widths_are_divided_as_lycoris_does() -> None:
    factorization = pytest.importorskip("lycoris.functional").factorization
    for width in (*range(1, 130), 320, 768, 1024, 1280, 2048, 2560, 3072, 5120, 10240):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 12, 16, 20):
            assert divisors_near(width, factor) == factorization(width, factor), (width, factor)


# ---- PEFT


def randomised_peft(model: nn.Module, config: Any) -> None:
    model.add_adapter(config)
    names = ("lora_", "hada_", "lokr_")
    own = {n.replace(".", "|"): p for n, p in model.named_parameters() if any(part in n for part in names)}
    randomise(nn.ParameterDict({n: p for n, p in own.items() if "magnitude" not in n}))
    with torch.no_grad():
        for name, parameter in own.items():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.7, 1.3, parameter.numel()).view(parameter.shape))


def test_a_dora_written_by_diffusers_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    models = toy_models(layers=1)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut"]
    randomised_peft(models[1], peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=layers))
    randomised_peft(models[0], peft.LoraConfig(r=2, lora_alpha=1, use_dora=True, target_modules=["q_proj", "fc1"]))
    trained = predictions(models)
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        weight_name="theirs.safetensors",
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(models[1])),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(models[0])),
        unet_lora_adapter_metadata=models[1].peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=models[0].peft_config["default"].to_dict(),
    )
    file = str(tmp_path / "theirs.safetensors")
    # some versions write the adapter's name into the keys
    named = {
        key.replace("magnitude_vector", "magnitude_vector.default.weight"): t for key, t in load_file(file).items()
    }
    assert any(".default.weight" in key for key in named)
    for tensors in (load_file(file), named):
        save_file(tensors, tmp_path / "again.safetensors", _metadata(file))
        assert_reads(tmp_path / "again.safetensors", trained)


def _metadata(file: str) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def assert_reads(file: Path, trained: list[Tensor]) -> None:
    ours = toy_models(layers=1)
    network, _ = lora.create_network_from_weights(1.0, str(file), None, *ours)
    network.apply_to(*ours)
    assert network.load_weights(str(file)).loaded == len(network.adapters)
    for got, expected in zip(predictions(ours), trained, strict=True):
        assert_same(got, expected)


def test_peft_reads_our_dora() -> None:
    """By renaming alone; diffusers' own translation leaves the magnitudes of such files out."""
    peft = pytest.importorskip("peft")
    from peft.utils import set_peft_model_state_dict

    models = toy_models(layers=1)
    network = lora.create_network(1.0, 4, 8.0, None, *models, dora_wd="True", conv_dim="4", conv_alpha="8")
    network.apply_to(*models, apply_text_encoder=False)
    randomise(network)
    trained = predictions(models)
    others = toy_models(layers=1)
    unet = others[1]
    paths = {name.replace(".", "_"): name for name, _ in unet.named_modules()}
    named = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    found: dict[str, Tensor] = {}
    for key, tensor in network.state_dict().items():
        module, _, name = key.partition(".")
        path = paths[module.removeprefix("lora_unet_")]
        if name == "dora_scale":
            found[f"{path}.lora_magnitude_vector"] = tensor.transpose(0, 1) if tensor.dim() == 4 else tensor[:, 0]
        elif name in named:
            found[f"{path}.{named[name]}"] = tensor
    modules = [key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")]
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=modules))
    result = set_peft_model_state_dict(unet, found)
    assert not result.unexpected_keys
    assert_same(predictions(others)[1], trained[1])


@pytest.mark.parametrize("form", ["loha", "loha tucker", "lokr", "lokr whole", "lokr tucker"])
def test_a_folder_that_peft_saved_is_read(tmp_path: Path, form: str) -> None:
    """Alpha stands in the configuration beside the tensors; PEFT scales whole LoKr blocks by it too."""
    peft = pytest.importorskip("peft")
    models = toy_models(layers=1)
    names = ["to_q", "to_v", "proj_in", "conv1"]
    own: dict[str, Any] = {"use_effective_conv2d": "tucker" in form, "target_modules": names}
    if "loha" in form:
        config = peft.LoHaConfig(r=3, alpha=5, **own)
    else:
        config = peft.LoKrConfig(r=40 if "whole" in form else 3, alpha=5, decompose_factor=2, **own)
    wrapped = peft.get_peft_model(models[1], config)
    adapter = {n.replace(".", "|"): p for n, p in wrapped.named_parameters() if "hada_" in n or "lokr_" in n}
    assert adapter
    randomise(nn.ParameterDict(adapter), size=0.5 if "loha" in form else 0.4)
    trained, base = predictions(models), predictions(toy_models(layers=1))
    assert (trained[1] - base[1]).abs().max() > 0.01
    wrapped.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha"] == 5
    assert_reads(tmp_path / "adapter_model.safetensors", trained)


# ---- SDXL


@pytest.mark.parametrize(
    ("algorithm", "args"), [("loha", {}), ("lokr", {"factor": "8"}), ("lora", {"dora_wd": "True"})]
)
def test_sdxl_names_are_those_of_stability_files(tmp_path: Path, algorithm: str, args: dict[str, str]) -> None:
    encoders, unet = toy_sdxl_models()
    network = MODULES[algorithm].create_network(1.0, 2, 1.0, None, encoders, unet, **args)
    network.apply_to(encoders, unet)
    randomise(network)
    trained = run_sdxl_unet(unet)
    network.save_weights(str(tmp_path / "net.safetensors"), None, None)
    names = {key.partition(".")[0] for key in load_file(tmp_path / "net.safetensors")}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in names
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1" in names
    encoders, unet = toy_sdxl_models()
    again, weights = lora.create_network_from_weights(1.0, str(tmp_path / "net.safetensors"), None, encoders, unet)
    again.apply_to(encoders, unet)
    again.load_state_dict(weights)
    torch.testing.assert_close(run_sdxl_unet(unet), trained, atol=1e-6, rtol=1e-5)


def test_files_that_tell_no_structure_are_named() -> None:
    from library.log import UserError
    from networks.kinds import require_whole

    broken = to_weight_table({"lora_unet_mid_block_attentions_0_proj_in.lokr_w1_a": torch.ones(4, 2)}, "x.safetensors")
    with pytest.raises(UserError, match="incomplete"):
        require_whole(broken)
