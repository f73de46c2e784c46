"""Memory savers change what is kept, not what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.models.memory import FP8, set_attention, set_gradient_checkpointing, store_in_fp8
from tests.toy import toy_modules

LATENTS_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
CONTEXT_BTD = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(2))


def run(unet: Any, latents_BCHW: Tensor) -> Tensor:
    return unet(latents_BCHW, torch.tensor([10, 700]), CONTEXT_BTD.to(latents_BCHW.dtype)).sample


def gradients(unet: Any) -> tuple[Tensor, Tensor]:
    latents_BCHW = LATENTS_BCHW.clone().requires_grad_()
    output = run(unet, latents_BCHW)
    output.square().sum().backward()
    assert latents_BCHW.grad is not None
    return output.detach(), latents_BCHW.grad


def test_sliced_attention_gives_the_same() -> None:
    unet = toy_modules()["unet"]
    expected = run(unet, LATENTS_BCHW)
    set_attention(unet, "sliced")
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"SlicedAttnProcessor"}  # type: ignore[union-attr]
    torch.testing.assert_close(run(unet, LATENTS_BCHW), expected, rtol=1e-4, atol=1e-5)
    set_attention(unet, "sdpa")
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}  # type: ignore[union-attr]
    assert torch.equal(run(unet, LATENTS_BCHW), expected)


def test_checkpointing_keeps_numbers_and_saves_activations() -> None:
    modules = toy_modules()
    unet, encoder = modules["unet"], modules["text_encoder"]
    kept: list[int] = []

    def sizes(unet: nn.Module) -> tuple[Tensor, Tensor]:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            latents_BCHW = LATENTS_BCHW.clone().requires_grad_()
            run(unet, latents_BCHW)
        kept.append(total)
        return gradients(unet)

    before = sizes(unet)
    set_gradient_checkpointing(unet, [encoder])
    after = sizes(unet)
    assert kept[1] < kept[0] / 3
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


def test_text_encoder_checkpointing_is_active_and_exact() -> None:
    encoder: Any = toy_modules()["text_encoder"]
    encoder.requires_grad_(True)
    ids_BT = torch.tensor([[49406, 320, 2368, 49407]])

    def gradient() -> tuple[Tensor, Tensor]:
        encoder.zero_grad()
        output = encoder(ids_BT).last_hidden_state
        output.square().mul(torch.arange(32)).sum().backward()
        return output.detach().clone(), encoder.encoder.layers[0].mlp.fc1.weight.grad.clone()

    before = gradient()
    set_gradient_checkpointing(None, [encoder])
    assert encoder.training
    calls = 0
    forward = encoder.encoder.layers[0].mlp.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    encoder.encoder.layers[0].mlp.forward = counted
    after = gradient()
    assert calls == 2  # once forward, once again in the backward pass
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first, second)


# ---- float8 storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Linear(6, 4, bias=False),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(6, 4, 1),
    ],
)
def test_fp8_layer_computes_with_the_rounded_weight(layer: nn.Module, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    shape = (5, 6) if isinstance(layer, nn.Linear) else (2, 6, 8, 8)
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rounded: Any = type(layer)(**_arguments(layer)).to(dtype)
    rounded.load_state_dict({key: _round(key, value) for key, value in layer.state_dict().items()})
    stored = type(layer)(**_arguments(layer)).to(dtype)
    stored.load_state_dict(layer.state_dict())
    holder = nn.ModuleList([stored])
    assert store_in_fp8(holder) == 1
    assert store_in_fp8(holder) == 0
    assert stored.weight.dtype == FP8
    results = []
    for module in (rounded, stored):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert stored.weight.grad is None


def _arguments(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": 6, "out_features": 4, "bias": layer.bias is not None}
    assert isinstance(layer, nn.Conv2d)
    return {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
    }


def _round(key: str, value: Tensor) -> Tensor:
    return value.to(FP8).to(value.dtype) if key == "weight" else value


def test_fp8_models_run_learn_and_shrink() -> None:
    modules = toy_modules(dtype=torch.bfloat16)
    unet, encoder = modules["unet"], modules["text_encoder"]
    before = sum(p.nbytes for p in unet.parameters())
    expected = run(unet, LATENTS_BCHW.bfloat16()).float()
    assert store_in_fp8(unet) > 150
    assert sum(p.nbytes for p in unet.parameters()) < 0.52 * before
    assert unet.dtype == torch.bfloat16
    latents_BCHW = LATENTS_BCHW.bfloat16().requires_grad_()
    output = run(unet, latents_BCHW)
    output.float().square().sum().backward()
    assert latents_BCHW.grad is not None
    assert latents_BCHW.grad.isfinite().all()
    assert (output.float() - expected).norm() / expected.norm() < 0.2
    assert store_in_fp8(encoder) == 12
    assert encoder.get_input_embeddings().weight.dtype == torch.bfloat16  # type: ignore[operator]
    assert encoder(torch.tensor([[49406, 49407]])).last_hidden_state.isfinite().all()


def test_fp8_with_checkpointing_and_large_weights() -> None:
    unet = toy_modules()["unet"]
    unet.time_embedding.linear_1.weight.data[0, 0] = 1e4  # type: ignore[union-attr,operator]
    store_in_fp8(unet)
    first = gradients(unet)
    set_gradient_checkpointing(unet)
    second = gradients(unet)
    assert first[0].isfinite().all()
    torch.testing.assert_close(first[1], second[1])


def test_fp8_under_autocast() -> None:
    unet = toy_modules()["unet"]
    store_in_fp8(unet)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradient = gradients(unet)
    assert output.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_fp8_refuses_layers_with_a_network() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="before networks"):
        store_in_fp8(nn.Sequential(layer))
