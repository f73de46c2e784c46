"""DyLoRA: prefixes of ranks work alone, what is drawn when, and what learns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.log import UserError
from networks import dylora
from networks.adapter import Adapter, AdapterSize, Dropouts
from networks.dylora import DyloraAdapter
from networks.kinds import adapter_of
from networks.lora import LoraAdapter
from tests.networks_fixtures import randomise, run_unet, toy_models, toy_sdxl_models

RANK = 8


def prefix_of(adapter: Adapter, rank: int) -> Adapter:
    """What a split of the file gives: the first ranks, and alpha in their proportion."""
    state = adapter.state_dict()
    alpha = state["alpha"] * rank / adapter.rank
    down, up = state["lora_down.weight"][:rank], state["lora_up.weight"][:, :rank]
    return adapter_of("x", {"alpha": alpha, "lora_down.weight": down, "lora_up.weight": up}, LoraAdapter)


def fit(adapter: Adapter, target_OI: Tensor, steps: int = 800) -> list[float]:
    """Train the weight difference towards a matrix; the squared errors of all prefixes, 0 ranks first."""
    layer = adapter.layer
    adapter.start()
    optimizer = torch.optim.Adam(adapter.trained_parameters(), 3e-2)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    for _ in range(steps):
        adapter.on_step()
        x = torch.randn(64, target_OI.shape[1], generator=generator)
        error = adapter.combine(layer(x), x) - layer(x) - x @ target_OI.T
        error.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    deltas = [torch.zeros_like(target_OI)]
    deltas += [prefix_of(adapter, rank).delta_weight().detach() for rank in range(1, adapter.rank + 1)]
    return [float((delta - target_OI).square().sum() / target_OI.square().sum()) for delta in deltas]


def test_every_prefix_alone_is_useful_which_those_of_a_lora_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([4.0, 3, 2.5, 2, 1.5, 1.2, 1, 0.8])
    left = torch.linalg.qr(torch.randn(24, RANK, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(16, RANK, generator=generator))[0]
    target = (left * values) @ right.T
    torch.manual_seed(0)
    layer = nn.Linear(16, 24).requires_grad_(False)
    nested = fit(DyloraAdapter("x", layer, AdapterSize(RANK, 8.0)), target)
    best = [float(values[rank:].square().sum() / values.square().sum()) for rank in range(RANK + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(nested))
    assert all(error < least + 0.05 for error, least in zip(nested, best, strict=True))
    plain = fit(LoraAdapter("x", layer, AdapterSize(RANK, 8.0)), target)
    assert plain[-1] < 0.01
    assert max(error - least for error, least in zip(plain, best, strict=True)) > 0.2


@pytest.mark.parametrize("shape", ["linear", "3x3"])
@pytest.mark.parametrize("dropouts", [{}, {"dropouts": Dropouts(neuron=1e-9)}], ids=["", "dropout"])
def test_a_step_runs_through_a_prefix_and_only_its_last_unit_learns(shape: str, dropouts: dict[str, Any]) -> None:
    layer = (nn.Linear(6, 10) if shape == "linear" else nn.Conv2d(6, 10, 3, padding=1)).requires_grad_(False)
    adapter = DyloraAdapter("x", layer, AdapterSize(RANK, 4.0), unit=2, **dropouts)
    randomise(adapter, size=2.0)
    x = torch.randn(3, 6) if shape == "linear" else torch.randn(3, 6, 5, 5)
    seen: set[int] = set()
    for seed in range(20):
        torch.manual_seed(seed)
        adapter.on_step()
        active = adapter.active
        assert active
        seen.add(active)
        y = adapter.combine(layer(x), x)
        # no factor by rank: the split of a file has the strength that was trained
        part = prefix_of(adapter, active)
        torch.testing.assert_close(y, layer(x) + adapter._operate(x, part.delta_weight()), atol=1e-5, rtol=1e-5)
        adapter.zero_grad()
        y.square().sum().backward()
        for gradient in (adapter.lora_down.weight.grad, adapter.lora_up.weight.grad.transpose(0, 1)):
            moved = gradient.flatten(1).any(dim=1)
            assert moved.nonzero().flatten().tolist() == [active - 2, active - 1]
    assert seen == {2, 4, 6, 8}
    adapter.eval()
    full = adapter.combine(layer(x), x)
    torch.testing.assert_close(full, layer(x) + adapter._operate(x, adapter.delta_weight()), atol=1e-5, rtol=1e-5)


def test_each_layer_draws_for_itself_and_the_same_from_the_same_seed() -> None:
    models = toy_models()
    network = dylora.create_network(1.0, RANK, 4.0, None, *models, unit="2", conv_dim="4", rank_dropout="0.2")
    network.apply_to(*models)
    network.train()
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        network.on_step_start(*models)
        draws.append([adapter.active for adapter in network.adapters])
    assert draws[0] == draws[1] != draws[2]
    assert {a for a, made in zip(draws[0], network.adapters, strict=True) if made.rank == 4} == {2, 4}
    assert {a for a, made in zip(draws[0], network.adapters, strict=True) if made.rank == 8} == {2, 4, 6, 8}
    randomise(network)
    shown = []
    for checkpointing in (False, True):  # the recomputed forward pass draws nothing anew
        if checkpointing:
            models[1].enable_gradient_checkpointing()
        torch.manual_seed(5)
        network.on_step_start(*models)
        run_unet(models[1]).square().mean().backward()
        shown.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
        network.zero_grad()
    assert all(torch.equal(shown[0][name], shown[1][name]) for name in shown[0])


def test_ranks_and_units_that_do_not_fit() -> None:
    models = toy_models()
    with pytest.raises(UserError, match=r"multiple of unit=3, lora_te_.* has 8; 6 or 9 would do"):
        dylora.create_network(1.0, 8, 1.0, None, *models, unit="3")
    with pytest.raises(UserError, match=r"has 4; 8 would do"):
        dylora.create_network(1.0, 8, 1.0, None, *models, unit="8", conv_dim="4")
    with pytest.raises(UserError, match="must be 1 or more"):
        dylora.create_network(1.0, 8, 1.0, None, *models, unit="0")
    network = dylora.create_network(1.0, 8, 1.0, None, *models, block_dims="4")
    assert {adapter.rank for adapter in network.adapters} == {4, 8}


def test_a_file_gives_the_ranks_and_the_arguments_the_unit() -> None:
    models = toy_models()
    state = dylora.create_network(1.0, 6, 1.0, None, *models, unit="3")
    state.apply_to(*models)
    tensors = state.state_dict()
    state.detach()
    again, _ = dylora.create_network_from_weights(1.0, None, None, *models, weights_sd=tensors, unit="2")
    assert {(type(adapter), adapter.rank, adapter.unit) for adapter in again.adapters} == {(DyloraAdapter, 6, 2)}
    with pytest.raises(UserError, match="multiple of unit=4"):
        dylora.create_network_from_weights(1.0, None, None, *models, weights_sd=tensors, unit="4")


def test_both_text_encoders_of_sdxl_are_kept_apart() -> None:
    """The reference calls both lora_te and so loses the first one."""
    encoders, unet = toy_sdxl_models()
    network = dylora.create_network(1.0, 4, 1.0, None, encoders, unet)
    network.apply_to(encoders, unet)
    kinds = [name.split("_")[1] for name in dict(network.named_children())]
    assert (kinds.count("te1"), kinds.count("te2"), "te" in kinds) == (12, 18, False)
