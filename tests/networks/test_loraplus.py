"""LoRA+: groups of their own for the tensors that start at zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.log import UserError
from library.plugin import load_network_module
from networks.network import AdapterNetwork
from tests.networks_fixtures import toy_models

Groups = list[dict[str, Any]]


def make(module: str = "lora", **args: str) -> AdapterNetwork:
    models = toy_models()
    network = load_network_module(f"networks.{module}").create_network(1.0, 4, 1.0, None, *models, **args)
    network.apply_to(*models)
    return network


def rates(groups: Groups) -> dict[str, float | None]:
    return {group["lr_name"]: group.get("lr") for group in groups}


@pytest.mark.parametrize("module", ["lora", "dylora"])
def test_ratios_of_all_and_of_the_parts(module: str) -> None:
    every = make(module, loraplus_lr_ratio="4").prepare_optimizer_params(1e-5, 1e-4)
    assert rates(every) == pytest.approx(
        {"textencoder": 1e-5, "textencoder_plus": 4e-5, "unet": 1e-4, "unet_plus": 4e-4}
    )
    parts = make(module, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16").prepare_optimizer_params(1e-5, 1e-4)
    assert rates(parts)["unet_plus"] == pytest.approx(16e-4)
    assert rates(parts)["textencoder_plus"] == pytest.approx(4e-5)
    only = make(module, loraplus_text_encoder_lr_ratio="2").prepare_optimizer_params(1e-5, 1e-4)
    assert rates(only) == pytest.approx({"textencoder": 1e-5, "textencoder_plus": 2e-5, "unet": 1e-4})


def test_up_is_faster_and_every_tensor_is_in_one_group() -> None:
    network = make(loraplus_lr_ratio="4", conv_dim="2")
    groups = network.prepare_optimizer_params(1e-5, 1e-4)
    names = {id(p): name for name, p in network.named_parameters()}
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    for group in groups:
        is_plus = group["lr_name"].endswith("_plus")
        assert {names[id(p)].endswith("lora_up.weight") for p in group["params"]} == {is_plus}
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("args", [{}, {"loraplus_lr_ratio": "1"}])
def test_ratio_1_is_as_without(args: dict[str, str]) -> None:
    network = make(**args)
    groups = network.prepare_optimizer_params(1e-5, 1e-4)
    assert rates(groups) == {"textencoder": 1e-5, "unet": 1e-4}
    order = [id(p) for group in groups for p in group["params"]]
    assert order == [id(p) for p in network.parameters()]


def test_with_block_rates_and_frozen_parts() -> None:
    network = make(loraplus_lr_ratio="4", down_lr_weight="0.5", mid_lr_weight="0", up_lr_weight="1")
    found = rates(network.prepare_optimizer_params(0.0, 1e-3))
    assert found["unet_block01"] == pytest.approx(5e-4)
    assert found["unet_block01_plus"] == pytest.approx(2e-3)
    assert found["unet_block24_plus"] == pytest.approx(4e-3)
    assert not any("textencoder" in name or "block12" in name for name in found)
    assert not any(p.requires_grad for name, p in network.named_parameters() if name.startswith("lora_te"))


def test_the_rate_of_all_is_multiplied_where_a_part_has_none() -> None:
    network = make(loraplus_lr_ratio="4")
    assert rates(network.prepare_optimizer_params(None, None, 1e-3)) == {
        "textencoder": None,
        "textencoder_plus": 4e-3,
        "unet": None,
        "unet_plus": 4e-3,
    }
    with pytest.raises(UserError, match=r"loraplus_\*.*--learning_rate"):
        network.prepare_optimizer_params(None, None, None)


def test_a_fixed_down_has_no_group() -> None:
    network = make("lora_fa", loraplus_lr_ratio="4")
    assert rates(network.prepare_optimizer_params(1e-5, 1e-4)) == {"textencoder_plus": 4e-5, "unet_plus": 4e-4}
    assert not any(p.requires_grad for name, p in network.named_parameters() if "lora_down" in name)


def test_networks_from_files_have_them_too() -> None:
    models = toy_models()
    lora = load_network_module("networks.lora")
    tensors = make().state_dict()
    network, _ = lora.create_network_from_weights(1.0, None, None, *models, tensors, loraplus_unet_lr_ratio="3")
    network.apply_to(*models)
    assert rates(network.prepare_optimizer_params(1e-5, 1e-4))["unet_plus"] == pytest.approx(3e-4)


def test_bad_values() -> None:
    with pytest.raises(UserError, match=r"loraplus_lr_ratio=0: must be above 0"):
        make(loraplus_lr_ratio="0")
    with pytest.raises(UserError, match=r"did you mean loraplus_unet_lr_ratio"):
        make(loraplus_unet_ratio="4")
