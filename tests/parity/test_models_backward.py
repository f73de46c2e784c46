"""What stays in memory between the forward and the backward pass: nothing for frozen layers that does not need to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measuring import SavedBytes
from library.families.sdxl_view import sdxl_view
from library.models.memory import keep_less_for_backward, set_gradient_checkpointing, store_in_fp8
from library.plugin import load_network_module
from networks import lora
from tests.toy import toy_modules

CONVOLUTIONS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "3x3": (6, 4, {"kernel_size": 3, "padding": 1}),
    "no bias": (6, 4, {"kernel_size": 3, "padding": 1, "bias": False}),
    "stride": (32, 32, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "odd stride": (6, 4, {"kernel_size": 3, "stride": 2}),
    "1x1": (32, 64, {"kernel_size": 1}),
    "dilated groups": (8, 4, {"kernel_size": 3, "dilation": 2, "groups": 2}),
}
FORMATS = {
    "nchw": (torch.contiguous_format, torch.contiguous_format),
    "nhwc": (torch.channels_last, torch.channels_last),
    "nhwc input": (torch.contiguous_format, torch.channels_last),
    "nhwc kernel": (torch.channels_last, torch.contiguous_format),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def passed(layer: nn.Module, x: Tensor, *more: Any) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input, and the bytes kept between them."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    activation = leaf * 1.0  # a leaf is held anyway
    with SavedBytes(layer.parameters()) as saved:
        output = layer(activation, *more)
    kept = saved.total
    output.backward(noise(*output.shape, seed=2).to(output))
    assert leaf.grad is not None
    return output.detach(), leaf.grad, kept


def frozen_copies(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The layer as torch runs it, and as ours."""
    layer.requires_grad_(False)
    ours = nn.Sequential(copy.deepcopy(layer))
    assert keep_less_for_backward(ours) == 1
    return layer, ours[0]


@DTYPES
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_frozen_convolution_keeps_nothing_and_computes_the_same(kind: str, formats: str, dtype: torch.dtype) -> None:
    inputs, outputs, more = CONVOLUTIONS[kind]
    of_weight, of_input = FORMATS[formats]
    layer: Any = nn.Conv2d(inputs, outputs, **more)
    theirs, ours = frozen_copies(layer.to(dtype, memory_format=of_weight))
    x = noise(2, inputs, 9, 8, dtype=dtype).contiguous(memory_format=of_input)
    expected, expected_grad, their_bytes = passed(theirs, x)
    output, grad, our_bytes = passed(ours, x)
    assert torch.equal(output, expected)
    assert torch.equal(grad, expected_grad)
    assert (their_bytes, our_bytes) == (x.nbytes, 0)


def test_convolution_under_autocast_and_a_gradient_without_memory() -> None:
    theirs, ours = frozen_copies(nn.Conv2d(6, 4, 3))
    results = []
    for layer in (theirs, ours):
        leaf = noise(2, 6, 8, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(leaf)
        output.sum().backward()  # its gradient is one number, repeated
        results.append((output.detach(), leaf.grad))
    assert results[1][0].dtype == torch.bfloat16
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_convolution_that_learns_after_all() -> None:
    theirs, ours = frozen_copies(nn.Conv2d(6, 4, 3))
    x = noise(2, 6, 8, 8)
    for part in ("weight", "bias"):
        gradients = []
        for layer in (theirs, ours):
            layer.requires_grad_(False).get_parameter(part).requires_grad_(True)
            layer(x).square().sum().backward()
            gradients.append(layer.get_parameter(part).grad)
        assert gradients[1] is not None
        assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]


def test_a_deep_copy_has_its_own_weights() -> None:
    _, ours = frozen_copies(nn.Conv2d(6, 4, 3))
    x = noise(2, 6, 8, 8)
    before = ours(x)
    other = copy.deepcopy(ours)
    other.weight.zero_()  # type: ignore[operator]
    assert torch.equal(ours(x), before)
    assert not torch.equal(other(x), before)


def test_float8_after_it() -> None:
    layers = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    expected = copy.deepcopy(layers)
    assert keep_less_for_backward(layers) == 1
    for model in (layers, expected):
        assert store_in_fp8(model) == 2
    x = noise(2, 6, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(passed(layers, x)[:2], passed(expected, x)[:2], strict=True))
    assert passed(layers, x)[2] == 0


@DTYPES
def test_gated_gelu_keeps_its_projection_only(dtype: torch.dtype) -> None:
    from diffusers.models.activations import GEGLU

    theirs, ours = frozen_copies(GEGLU(8, 16).to(dtype))
    x = noise(2, 5, 8, dtype=dtype)
    expected, expected_grad, their_bytes = passed(theirs, x)
    output, grad, our_bytes = passed(ours, x)
    assert torch.equal(output, expected)
    assert torch.equal(grad, expected_grad)
    projected = 2 * output.nbytes
    assert (their_bytes, our_bytes) == (projected + output.nbytes, projected)


def test_resnet_keeps_what_norms_and_activations_need() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    make: Any = ResnetBlock2D
    block: nn.Module = make(in_channels=32, out_channels=32, temb_channels=None).requires_grad_(False)
    x = noise(2, 32, 8, 8)
    _, _, before = passed(block, x, None)
    assert keep_less_for_backward(block) == 2
    _, _, after = passed(block, x, None)
    statistics = 2 * 2 * (2 * 32) * 4  # mean and deviation: two norms, two samples, 32 groups, float32
    assert after == 4 * x.nbytes + statistics  # inputs of two norms and two activations
    assert before == after + 2 * x.nbytes


# ---- a whole U-Net with a network


def unet_with_network(less: bool, dtype: torch.dtype = torch.float32, **args: str) -> tuple[Any, nn.Module]:
    unet: Any = toy_modules("sdxl", dtype=dtype)["unet"]
    if less:
        assert keep_less_for_backward(unet) > 30
    torch.manual_seed(0)
    network: Any = load_network_module(args.pop("module", "networks.lora"))
    network = network.create_network(1.0, 4, 4.0, None, None, sdxl_view(unet), **args)
    network.apply_to(None, sdxl_view(unet), False, True)
    for parameter in network.parameters():
        parameter.data.add_(noise(*parameter.shape) * 0.05)
    return unet, network


def predict(unet: Any) -> Tensor:
    dtype = unet.dtype
    added = {"text_embeds": noise(2, 48, dtype=dtype), "time_ids": torch.full((2, 6), 64.0)}
    times, context = torch.tensor([10, 700]), noise(2, 77, 96, dtype=dtype)
    return unet(noise(2, 4, 8, 8, dtype=dtype), times, context, added_cond_kwargs=added).sample


def learn(unet: Any, network: nn.Module) -> tuple[Tensor, list[Tensor], int]:
    """Prediction, gradients of the network, and the bytes kept by the forward pass."""
    with SavedBytes([*unet.parameters(), *network.parameters()]) as saved:
        output = predict(unet)
    kept = saved.total
    output.float().square().sum().backward()
    return output.detach(), [p.grad for p in network.parameters() if p.grad is not None], kept


@DTYPES
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"conv_dim": "2"},
        {"module": "lycoris.kohya", "algo": "locon", "preset": "full", "conv_dim": "2"},
        {"module": "lycoris.kohya", "algo": "locon", "preset": "full", "conv_dim": "2", "bypass_mode": "True"},
    ],
    ids=["linear", "conv", "lycoris", "lycoris_bypass"],
)
def test_networks_learn_the_same_and_less_is_kept(args: dict[str, str], dtype: torch.dtype) -> None:
    if "module" in args:
        pytest.importorskip("lycoris")
    models = [unet_with_network(less, dtype, **args) for less in (False, True)]
    if "module" in args:
        for _, network in models:
            network.to(dtype)
    before, after = (learn(*pair) for pair in models)
    assert torch.equal(before[0], after[0])
    assert len(after[1]) == len(before[1]) > 100
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert after[2] < before[2]


@DTYPES
def test_checkpointing_keeps_less_still(dtype: torch.dtype) -> None:
    plain, checkpointed = unet_with_network(True, dtype), unet_with_network(True, dtype)
    set_gradient_checkpointing(checkpointed[0])
    before, after = learn(*plain), learn(*checkpointed)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert after[2] < before[2] / 3


def test_nothing_is_kept_before_the_first_adapter() -> None:
    unet, network = unet_with_network(True)
    kept: list[int] = []
    with SavedBytes([*unet.parameters(), *network.parameters()]) as saved:
        for place in (unet.down_blocks[1].attentions[0].norm, unet.up_blocks[0]):
            place.register_forward_pre_hook(lambda *_: kept.append(saved.total))
        output = predict(unet)
    assert output.requires_grad
    assert kept[0] == 0
    assert kept[1] > 0


@DTYPES
def test_lora_keeps_no_second_copy_of_its_factors(dtype: torch.dtype) -> None:
    layer = nn.Linear(12, 8).to(dtype).requires_grad_(False)
    adapter = lora.LoraAdapter("one", layer, lora.AdapterSize(4, 2.0))
    nn.init.normal_(adapter.lora_up.weight)
    down, up = (p.detach().clone().requires_grad_() for p in (adapter.lora_down.weight, adapter.lora_up.weight))
    adapter.attach()
    ours, theirs = noise(3, 5, 12, dtype=dtype).requires_grad_(), noise(3, 5, 12, dtype=dtype).requires_grad_()
    with SavedBytes([*layer.parameters(), *adapter.parameters()]) as saved:
        output = adapter.layer(ours * 1.0)
    assert saved.total == (15 * 12 + 15 * 4) * dtype.itemsize  # the layer's input and the rank activations
    hidden = nn.functional.linear(theirs.view(15, 12), down.to(dtype))
    plain = nn.functional.linear(theirs, layer.weight, layer.bias).view(15, 8)
    expected = torch.addmm(plain, hidden, up.to(dtype).t(), alpha=0.5).view(3, 5, 8)
    assert torch.equal(output, expected)
    for result in (output, expected):
        result.backward(noise(3, 5, 8, seed=3).to(dtype))
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert torch.equal(adapter.lora_down.weight.grad, down.grad)  # type: ignore[arg-type]
    assert torch.equal(adapter.lora_up.weight.grad, up.grad)  # type: ignore[arg-type]
    assert adapter.lora_up.weight.grad.dtype == torch.float32  # type: ignore[union-attr]
