"""The plug-in protocol's methods on toy models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from library.log import UserError
from networks import lora
from networks.network import AdapterNetwork
from tests.networks_fixtures import randomise, run_clip, run_unet, toy_models

Models = tuple[CLIPTextModel, UNet2DConditionModel]


@pytest.fixture
def models() -> Models:
    return toy_models()


def make(models: Models, trained: bool = True, **args: object) -> AdapterNetwork:
    torch.manual_seed(0)
    network = lora.create_network(1.0, 4, 2.0, None, *models, **args)
    network.apply_to(*models)
    if trained:
        randomise(network)
    return network


def outputs(models: Models) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return run_clip(models[0]), run_unet(models[1])


@pytest.mark.parametrize("args", [{}, {"conv_dim": "2"}])
def test_a_new_network_changes_nothing_and_a_trained_one_comes_off_without_trace(
    models: Models, args: dict[str, str]
) -> None:
    before = outputs(models)
    keys = [list(model.state_dict()) for model in models]
    network = make(models, trained=False, **args)
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), before, strict=True))
    randomise(network)
    assert not any(torch.equal(a, b) for a, b in zip(outputs(models), before, strict=True))
    assert [list(model.state_dict()) for model in models] == keys  # base checkpoints keep their names
    network.set_multiplier(0.0)
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), before, strict=True))
    network.detach()
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), before, strict=True))
    assert not any("forward" in vars(module) for model in models for module in model.modules())


def test_only_applied_halves_are_trained_and_saved(models: Models) -> None:
    network = lora.create_network(1.0, 4, 1.0, None, *models)
    assert not list(network.parameters())
    network.apply_to(*models, apply_text_encoder=False)
    assert len(network.adapters) == 192
    assert all(key.startswith("lora_unet_") for key in network.state_dict())
    network.detach()
    network.apply_to(*models, apply_unet=False)
    assert all(key.startswith("lora_te_") for key in network.state_dict())
    network.detach()
    with pytest.raises(UserError, match="no layer to train"):
        network.apply_to(*models, apply_unet=False, apply_text_encoder=False)


def test_merge_equals_attached_in_float32_and_bfloat16(models: Models, tmp_path: Path) -> None:
    before = outputs(models)
    network = make(models, conv_dim="2")
    attached = outputs(models)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, None)
    network.detach()
    merged, weights = lora.create_network_from_weights(1.0, file, None, *models, for_inference=True)
    assert merged.is_mergeable()
    merged.merge_to(*models, weights, torch.float32, "cpu")
    for got, expected, base in zip(outputs(models), attached, before, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert (got - base).abs().max() > 0.05
    half = toy_models()
    for model in half:
        model.to(torch.bfloat16)
    merged, weights = lora.create_network_from_weights(1.0, file, None, *half, for_inference=True)
    layer = half[1].mid_block.attentions[0].proj_in
    exact = layer.weight.float()
    merged.merge_to(*half, weights, torch.bfloat16, "cpu")
    delta = next(a for a in merged.adapters if a.layer is layer).delta_weight()
    assert torch.equal(layer.weight, (exact + delta).to(torch.bfloat16))  # rounded once


def test_pre_calculation_folds_and_restores_exactly(models: Models) -> None:
    before = outputs(models)
    first, second = make(models), make(models)
    randomise(second, seed=11)
    first.set_multiplier(0.5)
    expected = outputs(models)
    for network in (first, second):
        network.backup_weights()
    for network in (first, second):
        network.pre_calculation()
    for got, want in zip(outputs(models), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for network in (first, second):  # in the order of making, as generators do
        network.restore_weights()
        network.set_multiplier(0.0)
    assert all(torch.equal(a, b) for a, b in zip(outputs(models), before, strict=True))


def test_gradients_reach_both_factors_only(models: Models) -> None:
    network = make(models, trained=False)
    network.prepare_grad_etc(*models)
    network.on_epoch_start(*models)
    (run_unet(models[1]).square().mean() + run_clip(models[0]).square().mean()).backward()
    ups = [p for name, p in network.named_parameters() if "lora_up" in name]
    assert all(p.grad is not None and p.grad.any() for p in ups)
    assert all(p.grad is None for model in models for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients_with_dropouts(models: Models) -> None:
    network = make(models, neuron_dropout=0.2, rank_dropout="0.2", module_dropout="0.2")
    network.prepare_grad_etc(*models)
    network.on_epoch_start(*models)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            models[1].enable_gradient_checkpointing()
            network.enable_gradient_checkpointing()
        torch.manual_seed(5)
        network.on_step_start(*models)
        run_unet(models[1]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
        network.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_module_dropout_is_one_draw_a_step(models: Models) -> None:
    network = make(models, module_dropout="0.2")
    network.train()
    patterns = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        network.on_step_start(*models)
        patterns.append([adapter.is_skipped for adapter in network.adapters])
        after = torch.rand(1)
        torch.manual_seed(seed)
        torch.rand(len(patterns[-1]))
        assert torch.equal(after, torch.rand(1))
    assert patterns[0] == patterns[1] != patterns[2]
    assert 0.1 < sum(patterns[0]) / len(patterns[0]) < 0.3
    skipped = outputs(models)
    network.eval()
    assert not torch.equal(outputs(models)[1], skipped[1])


def names(groups: list[dict[str, object]]) -> dict[object, object]:
    return {group["lr_name"]: group.get("lr", "default") for group in groups}


def test_optimizer_groups(models: Models) -> None:
    network = make(models)
    everything = {id(p) for p in network.parameters()}
    groups = network.prepare_optimizer_params(1e-5, 1e-4, 1e-3)
    assert names(groups) == {"textencoder": 1e-5, "unet": 1e-4}
    assert {id(p) for group in groups for p in group["params"]} == everything
    assert names(network.prepare_optimizer_params(None, None, 1e-3)) == {"textencoder": "default", "unet": "default"}
    assert names(network.prepare_optimizer_params(None, None)) == {"textencoder": "default", "unet": "default"}
    assert names(network.prepare_optimizer_params([3e-5], None, 1.0)) == {"textencoder": 3e-5, "unet": "default"}
    torch.optim.AdamW(groups)  # extra keys of groups are allowed


def test_rate_zero_freezes_and_stays_frozen(models: Models) -> None:
    network = make(models)
    groups = network.prepare_optimizer_params(0.0, None, 1e-3)
    network.prepare_grad_etc(*models)
    assert names(groups) == {"unet": "default"}
    assert {name.startswith("lora_unet") for name, p in network.named_parameters() if p.requires_grad} == {True}
    assert {id(p) for p in network.get_trainable_params()} == {id(p) for p in groups[0]["params"]}
    assert network.prepare_optimizer_params(None, None, 0.0) == []
    assert not network.get_trainable_params()


def test_two_text_encoders_may_have_two_rates(models: Models) -> None:
    encoders = [models[0], toy_models()[0]]
    network = lora.create_network(1.0, 4, 1.0, None, encoders, models[1])
    network.apply_to(encoders, models[1])
    assert names(network.prepare_optimizer_params(1e-5, 1e-4)) == {"textencoder": 1e-5, "unet": 1e-4}
    separate = network.prepare_optimizer_params([1e-5, 0.0], 1e-4)
    assert names(separate) == {"textencoder1": 1e-5, "unet": 1e-4}
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith("lora_te2_") for name in frozen)


def test_norm_limit(models: Models) -> None:
    network = make(models, trained=False)
    first, second, *rest = network.adapters
    for adapter, norm in ((first, 1.2331), (second, 0.001)):
        nn.init.ones_(adapter.lora_up.weight)
        adapter.scale_delta_(norm / adapter.delta_weight().norm())
    kept = second.delta_weight()
    count, mean, largest = network.apply_max_norm_regularization(1.0, torch.device("cpu"))
    assert count == 1
    assert largest == pytest.approx(1.0, abs=1e-5)
    assert mean == pytest.approx(1.001 / len(network.adapters), rel=1e-4)
    assert first.delta_weight().norm().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(second.delta_weight(), kept)
    assert not any(adapter.delta_weight().any() for adapter in rest)
    assert network.apply_max_norm_regularization(0.5, None)[0] == 1


def test_save_load_round_trip_keeps_output(models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = make(models, conv_dim="2", conv_alpha="1.5")
    trained, expected = outputs(models), network.state_dict()
    for suffix in ("safetensors", "pt"):
        file = str(tmp_path / f"net.{suffix}")
        network.save_weights(file, None, {"ss_network_dim": "4"})
        fresh_models = toy_models()
        fresh = lora.create_network(1.0, 4, 7.0, None, *fresh_models, conv_dim="2")
        fresh.apply_to(*fresh_models)
        report = fresh.load_weights(file)
        assert report.loaded == len(network.adapters)
        assert not report.fresh
        assert "its alpha 2.0 replaces 7.0" in caplog.text
        # the file's alpha is used as well as saved again
        assert all(torch.equal(a, b) for a, b in zip(outputs(fresh_models), trained, strict=True))
        assert all(torch.equal(t, expected[k]) for k, t in fresh.state_dict().items())


def test_dims_from_weights(models: Models, tmp_path: Path) -> None:
    ranks = ",".join(str(1 + index % 3) for index in range(25))
    network = make(models, block_dims=ranks, conv_dim="5", conv_alpha="2")
    trained = outputs(models)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, None)
    fresh_models = toy_models()
    fresh, weights = lora.create_network_from_weights(
        1.0, file, None, *fresh_models, neuron_dropout=0.1, rank_dropout="0.2", module_dropout="0.3"
    )
    fresh.apply_to(*fresh_models)
    assert not torch.equal(outputs(fresh_models)[1], trained[1])  # not loaded yet
    fresh.load_weights(file)
    fresh.eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh_models), trained, strict=True))
    assert weights.keys() == network.state_dict().keys()
    dropouts = fresh.adapters[0].dropouts  # the reference forgets them
    assert (dropouts.neuron, dropouts.rank, dropouts.module) == (0.1, 0.2, 0.3)
    assert (fresh.network_dim, fresh.network_alpha) == ("Dynamic", "2.0")
    plain = make(toy_models(), conv_dim="2")
    assert (plain.network_dim, plain.network_alpha) == ("4", "2.0")
    for_inference, _ = lora.create_network_from_weights(
        1.0, file, None, *toy_models(), for_inference=True, neuron_dropout=0.1
    )
    assert for_inference.adapters[0].dropouts.neuron == 0


def save(network: AdapterNetwork, tmp_path: Path, name: str = "net") -> str:
    file = str(tmp_path / f"{name}.safetensors")
    network.save_weights(file, None, None)
    return file


def test_files_that_do_not_fit_are_refused(models: Models, tmp_path: Path) -> None:
    everything = save(make(models, conv_dim="2"), tmp_path)
    narrow = toy_models()
    network = make(narrow, trained=False)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"do not exist in this network, first lora_unet_.*dim_from_weights"):
        network.load_weights(everything)
    other_rank = toy_models()
    wide = lora.create_network(1.0, 8, 1.0, None, *other_rank)
    wide.apply_to(*other_rank)
    with pytest.raises(UserError, match=r"204 layers do not fit, first .*rank 8 here.*dim_from_weights"):
        wide.load_weights(save(network, tmp_path, "plain"))
    after = network.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    sd2 = toy_models(layers=3)
    deeper = make(sd2)
    with pytest.raises(UserError, match="made for another base model"):
        network.load_weights(save(deeper, tmp_path, "deeper"))
    with pytest.raises(UserError, match="do not exist"):
        lora.create_network_from_weights(1.0, save(deeper, tmp_path, "deeper"), None, *toy_models())


def test_a_half_that_is_missing_or_not_trained_is_reported(models: Models, tmp_path: Path) -> None:
    both = save(make(models), tmp_path)
    unet_models = toy_models()
    unet_only = lora.create_network(1.0, 4, 1.0, None, *unet_models)
    unet_only.apply_to(*unet_models, apply_text_encoder=False)
    report = unet_only.load_weights(both)
    assert (report.loaded, len(report.fresh), report.left_out) == (192, 0, 12)
    half = save(unet_only, tmp_path, "half")
    fresh_models = toy_models()
    report = make(fresh_models, trained=False).load_weights(half)
    assert (report.loaded, len(report.fresh)) == (192, 12)
    assert "12 not in the file" in str(report)
    assert torch.equal(outputs(fresh_models)[0], outputs(toy_models())[0])
    # without a text encoder at hand its part of a file is nobody's
    network, _ = lora.create_network_from_weights(1.0, both, None, None, toy_models()[1])
    assert network.count("text_encoder") == 0
