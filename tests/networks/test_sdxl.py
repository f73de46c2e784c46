"""Networks on SDXL: names, blocks, rates, files of other programs, and plug-ins through the view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.families.plugin_views import text_encoder_view
from library.families.sdxl_view import UNetView, sdxl_view
from library.log import UserError
from library.plugin import load_network_module
from networks import lora
from networks.adapter import Adapter
from networks.block_weights import SDXL_BLOCKS, block_of
from networks.network import AdapterNetwork
from networks.targets import text_encoder_targets, unet_targets
from networks.weights import read_weights
from tests.networks_fixtures import bare_sdxl_models, randomise, run_clip, run_sdxl_unet, toy_models, toy_sdxl_models

Models = tuple[list[Any], Any]
TRANSFORMER_BLOCKS = 2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2  # down, middle, up


def views(models: Models) -> tuple[list[nn.Module], UNetView]:
    encoders, view = models
    return [text_encoder_view(encoder) for encoder in encoders], view


def predictions(models: Models) -> list[Tensor]:
    (first, second), unet = models
    with torch.no_grad():
        second_states: Any = second(torch.tensor([[1, 5, 7, 99], [1, 9, 99, 99]]))
        return [run_clip(first), second_states.last_hidden_state, second_states.text_embeds, run_sdxl_unet(unet)]


def made(encoders: Any, unet: nn.Module, rank: int = 4, **args: Any) -> AdapterNetwork:
    network = lora.create_network(1.0, rank, 2.0, None, encoders, unet, **args)
    network.apply_to(encoders, unet)
    return network


def trained(models: Models, **args: Any) -> AdapterNetwork:
    network = made(*models, **args)
    randomise(network)
    return network


# ---- names and structure


def test_the_view_is_the_same_model() -> None:
    encoders, unet = bare_sdxl_models()
    before = run_sdxl_unet(unet)
    view = sdxl_view(unet)
    torch.testing.assert_close(run_sdxl_unet(view), before, rtol=0, atol=0)
    assert {id(p) for p in view.parameters()} == {id(p) for p in unet.parameters()}
    assert (view.device, view.dtype) == (unet.device, unet.dtype)
    randomise(made(encoders, view))
    assert not torch.equal(run_sdxl_unet(unet), before)  # adapters on the view act in the real U-Net


def test_other_class_names_make_no_difference() -> None:
    encoders, unet = toy_sdxl_models()
    for module in unet.modules():
        if type(module) not in (nn.Linear, nn.Conv2d, nn.ModuleList):
            module.__class__ = type("Renamed" + type(module).__name__, (type(module),), {})
    names = [adapter.name for adapter in made(encoders, unet).adapters]
    assert {name.partition("_text_model")[0] for name in names if "_text_model" in name} == {"lora_te1", "lora_te2"}
    assert {name.split("_")[2] for name in names if name.startswith("lora_unet")} == {"input", "middle", "output"}


@pytest.mark.parametrize("viewed", [False, True])
def test_a_missing_or_unknown_layer_is_an_error(viewed: bool) -> None:
    unet: Any = bare_sdxl_models()[1]
    unet.mid_block.attentions[0].extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"mid(dle)?_block\.[\w.]+\.extra"):
        unet_targets(sdxl_view(unet) if viewed else unet, False)
    unet = bare_sdxl_models()[1]
    unet.up_blocks[1].attentions[2].transformer_blocks[1].attn2.to_k = nn.Identity()
    with pytest.raises(UserError, match=r"1 of \d+ .*transformer_blocks\.1\.attn2\.to_k"):
        unet_targets(sdxl_view(unet) if viewed else unet, False)


def test_a_renamed_resnet_layer_is_an_error() -> None:
    unet: Any = bare_sdxl_models()[1]
    resnet = unet.down_blocks[1].resnets[0]
    resnet.convolution_2 = resnet.conv2
    del resnet.conv2
    for attempt in (lambda: sdxl_view(unet), lambda: unet_targets(unet, True)):
        with pytest.raises(UserError, match=r"down_blocks\.1\.resnets\.0\.conv2"):
            attempt()


# ---- blocks


def test_block_ranks_and_alphas() -> None:
    """The reference gave every layer of SDXL the last value of the list."""
    dims = [index % 5 for index in range(19)]
    network = made(
        *toy_sdxl_models(),
        conv_dim="2",
        block_dims=",".join(map(str, dims)),
        block_alphas=",".join(str(index + 1) for index in range(19)),
    )
    plain = [adapter for adapter in network.adapters if _is_plain(adapter)]
    # neither the first convolution nor a block of rank 0 has layers; 3 and 6 hold a convolution only
    blocks = {block_of(adapter.name, SDXL_BLOCKS) for adapter in plain}
    assert blocks == {index for index in range(1, 19) if dims[index]} - {3, 6}
    for adapter in plain:
        block = block_of(adapter.name, SDXL_BLOCKS)
        assert block is not None
        assert (adapter.rank, float(adapter.alpha)) == (dims[block], block + 1)


def _is_plain(adapter: Adapter) -> bool:
    is_spatial = isinstance(adapter.layer, nn.Conv2d) and adapter.layer.kernel_size != (1, 1)
    return adapter.name.startswith("lora_unet") and not is_spatial


def test_block_rates_have_their_own_groups() -> None:
    network = made(
        *toy_sdxl_models(),
        down_lr_weight="1,1,1,1,0.5,1,1,0,1",
        mid_lr_weight="0.25",
        up_lr_weight="zeros+2",
    )
    groups = {group["lr_name"]: group["lr"] for group in network.prepare_optimizer_params([1e-3, 2e-3], 1e-2, 1e-4)}
    blocks = {4: 0.5, 5: 1, 8: 1, 9: 0.25} | dict.fromkeys(range(10, 16), 2)
    rates = {f"unet_block{block:02}": pytest.approx(1e-2 * factor) for block, factor in blocks.items()}
    assert groups == {"textencoder1": 1e-3, "textencoder2": 2e-3, **rates}


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (
            {"block_dims": ",".join(["4"] * 25)},
            r"block_dims=.*needs 19 values, has 25 \(SDXL: input blocks 0-8, middle",
        ),
        ({"down_lr_weight": ",".join(["1"] * 12)}, r"down_lr_weight=.*needs 9 numbers, has 12 \(SDXL\)"),
    ],
)
def test_lists_of_sd1_are_refused(args: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        made(*toy_sdxl_models(), **args)


def test_presets_span_nine_blocks() -> None:
    network = made(*toy_sdxl_models(), up_lr_weight="linear")
    groups = {group["lr_name"]: group.get("lr") for group in network.prepare_optimizer_params(None, 8e-3, 1e-3)}
    assert groups["unet_block15"] == pytest.approx(8e-3 * 5 / 8)
    assert "unet_block10" not in groups  # the factor 0 leaves its block out


# ---- rates of the text encoders


def test_each_text_encoder_has_its_rate() -> None:
    network = made(*toy_sdxl_models())
    groups = {group["lr_name"]: group for group in network.prepare_optimizer_params([1e-3, 2e-3], 1e-2, None)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "textencoder1": 1e-3,
        "textencoder2": 2e-3,
        "unet": 1e-2,
    }
    assert [len(groups[f"textencoder{number}"]["params"]) for number in (1, 2)] == [2 * 2 * 6, 2 * 3 * 6]


def test_one_rate_means_both_and_zero_freezes_one() -> None:
    network = made(*toy_sdxl_models())
    assert [group["lr_name"] for group in network.prepare_optimizer_params(1e-3, 1e-2, None)] == ["textencoder", "unet"]
    groups = network.prepare_optimizer_params([0.0, 1e-3], 1e-2, None)
    assert [group["lr_name"] for group in groups] == ["textencoder2", "unet"]
    assert network.may_skip_parameters  # nothing uses the last state of the first text encoder
    learning = {name.split("_")[1] for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {"te2", "unet"}


def test_more_rates_than_text_encoders_are_refused() -> None:
    with pytest.raises(UserError, match=r"--text_encoder_lr: 3 rates for 2 text encoders"):
        made(*toy_sdxl_models()).prepare_optimizer_params([1e-3] * 3, 1e-2, None)
    encoder, unet = toy_models()
    with pytest.raises(UserError, match=r"--text_encoder_lr: 2 rates for 1 text encoder"):
        made(encoder, unet).prepare_optimizer_params([1e-3] * 2, 1e-2, None)


# ---- files


@pytest.mark.parametrize("args", [{}, {"conv_dim": "2", "conv_alpha": "1"}], ids=["lierla", "c3lier"])
def test_diffusers_reads_our_file(tmp_path: Path, args: dict[str, str]) -> None:
    models = toy_sdxl_models()
    before = predictions(models)
    network = trained(models, **args)
    ours = predictions(models)
    network.save_weights(str(tmp_path / "net.safetensors"), None, None)
    pipe = pipeline(bare_sdxl_models())
    pipe.load_lora_weights(str(tmp_path), weight_name="net.safetensors")
    theirs = predictions(([pipe.text_encoder, pipe.text_encoder_2], pipe.unet))
    for got, expected, base in zip(theirs, ours, before, strict=True):
        assert (expected - base).abs().max() > 0.05
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_file_written_by_diffusers_is_read(tmp_path: Path) -> None:
    file = str(tmp_path / "theirs.safetensors")
    theirs = diffusers_file(tmp_path)
    models = toy_sdxl_models()
    network, _ = lora.create_network_from_weights(1.0, file, None, *models)
    network.apply_to(*models)
    report = network.load_weights(file)
    assert report.loaded == len(network.adapters) == 2 * (2 + 3) + 8 * TRANSFORMER_BLOCKS
    assert report.left_out == 0
    for got, expected in zip(predictions(models), theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    merged = toy_sdxl_models()
    network, weights = lora.create_network_from_weights(1.0, file, None, *views(merged))
    network.merge_to(None, None, weights)
    for got, expected in zip(predictions(merged), theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_diffusers_file_with_only_the_first_encoder_is_read() -> None:
    models = toy_sdxl_models()
    paths = [f"text_encoder.{target.path}" for target in text_encoder_targets(models[0][0])]
    tensors = {f"{path}.lora_A.weight": torch.randn(2, 64 if path.endswith("fc2") else 32) for path in paths}
    tensors |= {f"{path}.lora_B.weight": torch.randn(64 if path.endswith("fc1") else 32, 2) for path in paths}
    network, weights = lora.create_network_from_weights(1.0, None, None, *models, weights_sd=tensors)
    assert {key.partition("_text_model")[0] for key in weights} == {"lora_te1"}
    assert len(network.adapters) == 12


def test_files_of_another_base_model_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "net.safetensors")
    encoder, unet = toy_models()
    made(encoder, unet).save_weights(file, None, None)
    with pytest.raises(UserError, match="another base model"):
        lora.create_network_from_weights(1.0, file, None, *toy_sdxl_models())
    made(*toy_sdxl_models()).save_weights(file, None, None)
    with pytest.raises(UserError, match="another base model"):
        lora.create_network_from_weights(1.0, file, None, *toy_models())


def test_a_layer_under_both_names_is_an_error() -> None:
    models = toy_sdxl_models()
    state = dict(made(*models).state_dict())
    target = next(t for t in unet_targets(models[1], False))
    for name in lora.LoraAdapter.tensor_names:
        state[f"{target.other_names[0]}.{name}"] = state[f"{target.name}.{name}"]
    with pytest.raises(UserError, match="one layer under two names"):
        lora.create_network_from_weights(1.0, None, None, *models, weights_sd=state)


# ---- plug-ins


@pytest.mark.parametrize("algo", ["locon", "lokr"])
def test_lycoris_writes_the_names_of_files(tmp_path: Path, algo: str) -> None:
    pytest.importorskip("lycoris")
    module = load_network_module("lycoris.kohya")
    torch.manual_seed(0)
    models = toy_sdxl_models()
    before = predictions(models)
    given = views(models)
    args = {"neuron_dropout": None, "algo": algo, "factor": "2", "dropout": "0.0", "conv_dim": "2", "preset": "full"}
    network = module.create_network(1.0, 4, 1.0, None, *given, **args)
    network.apply_to(*given, True, True)
    names = {key.partition(".")[0] for key in network.state_dict()}
    assert names == {adapter.name for adapter in made(*toy_sdxl_models(), conv_dim="2").adapters}
    randomise(network)
    trained_ones = predictions(models)
    assert not any(torch.equal(a, b) for a, b in zip(trained_ones, before, strict=True))
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, torch.float32, {})
    fresh = toy_sdxl_models()
    given = views(fresh)
    again, weights = module.create_network_from_weights(1.0, file, None, *given)
    again.apply_to(*given, True, True)
    again.load_state_dict(weights, strict=False)
    for got, expected in zip(predictions(fresh), trained_ones, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    if algo == "locon":  # the same kind of file as ours
        assert len(read_weights(file).modules) == len(names)


# ---- helpers


def pipeline(models: Models) -> Any:
    pytest.importorskip("peft")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

    parts: dict[str, Any] = {
        "vae": AutoencoderKL(block_out_channels=(32,)),
        "text_encoder": models[0][0],
        "text_encoder_2": models[0][1],
        "tokenizer": None,
        "tokenizer_2": None,
        "unet": models[1],
        "scheduler": DDIMScheduler(),
    }
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def diffusers_file(folder: Path) -> list[Tensor]:
    """Write ``theirs.safetensors`` with adapters of the attention layers; returns the predictions with them."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    models: Models = bare_sdxl_models()
    (first, second), unet = models
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=attention))
    layers: dict[str, Any] = {}
    for name, model in (("unet", unet), ("text_encoder", first), ("text_encoder_2", second)):
        if name != "unet":
            model.add_adapter(peft.LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "out_proj"]))
        randomise(nn.ParameterDict({n.replace(".", "|"): p for n, p in model.named_parameters() if "lora_" in n}))
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        layers[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(str(folder), weight_name="theirs.safetensors", **layers)
    return predictions(models)
