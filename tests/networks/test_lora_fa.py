"""LoRA-FA: ``down`` is a constant of the training, and nothing but rank activations is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import lora_fa
from networks.adapter import AdapterSize, Dropouts
from networks.lora import LoraAdapter
from networks.lora_fa import LoraFaAdapter
from tests.networks_fixtures import randomise, run_clip, run_unet, toy_models

LAYERS = {
    "linear": lambda: nn.Linear(48, 80),
    "1x1": lambda: nn.Conv2d(48, 80, 1),
    "3x3 stride 2": lambda: nn.Conv2d(48, 80, 3, stride=2, padding=1),
}


def make(shape: str, dropouts: Dropouts | None = None) -> LoraFaAdapter:
    layer = LAYERS[shape]().requires_grad_(False)
    adapter = LoraFaAdapter("x", layer, AdapterSize(4, 2.0), **({"dropouts": dropouts} if dropouts else {}))
    adapter.start()
    randomise(adapter)
    adapter.requires_grad_(False)
    for parameter in adapter.trained_parameters():
        parameter.requires_grad_(True)
    return adapter


def kept_sizes(adapter: LoraAdapter, x: Tensor, y: Tensor) -> set[int]:
    """Sizes of what the adapter alone keeps, its own tensors left out."""
    own = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapter.combine(y, x)
    return {tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() not in own}


@pytest.mark.parametrize("shape", list(LAYERS))
@pytest.mark.parametrize("dropouts", [None, Dropouts(rank=0.3)], ids=["", "dropout"])
def test_only_rank_activations_are_kept(shape: str, dropouts: Dropouts | None) -> None:
    adapter = make(shape, dropouts)
    x = torch.randn(3, 48, 8, 8) if isinstance(adapter.layer, nn.Conv2d) else torch.randn(3, 64, 48)
    y = adapter.layer(x)
    hidden = y.numel() // 80 * 4
    sizes = kept_sizes(adapter, x.requires_grad_(), y)
    assert max(sizes) == hidden
    plain = LoraAdapter("x", adapter.layer, AdapterSize(4, 2.0), dropouts=adapter.dropouts)
    assert x.numel() in kept_sizes(plain, x, y)


@pytest.mark.parametrize("shape", list(LAYERS))
def test_gradients_are_those_of_lora(shape: str) -> None:
    adapter = make(shape)
    x = torch.randn(3, 48, 8, 8) if isinstance(adapter.layer, nn.Conv2d) else torch.randn(3, 64, 48)
    x.requires_grad_()
    wanted = [x, *adapter.trained_parameters()]
    weight = torch.randn_like(adapter.layer(x))
    got = torch.autograd.grad((adapter.combine(adapter.layer(x), x) * weight).sum(), wanted)
    plain = LoraAdapter("x", adapter.layer, AdapterSize(4, 2.0))
    plain.load_state_dict(adapter.state_dict())
    wanted[1] = plain.lora_up.weight
    exact = torch.autograd.grad((plain.combine(adapter.layer(x), x) * weight).sum(), wanted)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_down_starts_normal_with_the_variance_of_its_width_and_rank() -> None:
    torch.manual_seed(0)
    adapter = LoraFaAdapter("x", nn.Conv2d(60, 64, 3), AdapterSize(64, 1.0))
    adapter.start()
    assert adapter.lora_down.weight.std().item() == pytest.approx((2 / (60 + 64)) ** 0.5, rel=0.02)
    assert adapter.lora_down.weight.abs().max() > 3.5 * (2 / 124) ** 0.5  # no uniform
    assert not adapter.lora_up.weight.any()


def test_nothing_thaws_down_and_clipping_sees_up_alone() -> None:
    """The reference's own requires_grad_ thaws it: its gradients are never cleared and shrink those of the rest."""
    models = toy_models()
    network = lora_fa.create_network(1.0, 4, 1.0, None, *models, conv_dim="2")
    network.apply_to(*models)
    (group_text, group_unet) = network.prepare_optimizer_params(1e-3, 1e-3)
    network.prepare_grad_etc(*models)
    network.on_epoch_start(*models)
    downs = {name: p for name, p in network.named_parameters() if "lora_down" in name}
    (run_unet(models[1]).square().mean() + run_clip(models[0]).square().mean()).backward()
    assert downs
    assert not any(p.requires_grad or p.grad is not None for p in downs.values())
    grouped = {id(p) for group in (group_text, group_unet) for p in group["params"]}
    assert {id(p) for p in network.get_trainable_params()} == grouped
    assert grouped.isdisjoint({id(p) for p in downs.values()})
    assert all(p.grad is not None for p in network.get_trainable_params())
    assert {f"{name}.lora_down.weight" for name in dict(network.named_children())} <= network.state_dict().keys()
