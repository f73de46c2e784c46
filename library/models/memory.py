"""What saves memory without changing the model: attention kinds, gradient checkpointing, 8-bit storage of frozen
weights.

Shape legend: B rows, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

Attention = Literal["sdpa", "xformers", "sliced"]
FP8 = torch.float8_e4m3fn
_KEPT = ("conv_in", "conv_out")  # tiny, and a diffusers model tells its type by its first parameter


def set_attention(module: nn.Module, kind: Attention) -> None:
    """Choose how a diffusers U-Net or VAE computes attention. ``sliced``: head by head, least memory, slow."""
    from diffusers.models.attention_processor import Attention as AttentionBlock
    from diffusers.models.attention_processor import AttnProcessor2_0

    model = cast(Any, module)
    if kind == "xformers":
        model.enable_xformers_memory_efficient_attention()
        return
    model.set_attn_processor(AttnProcessor2_0())
    if kind == "sliced":
        for child in module.modules():
            if isinstance(child, AttentionBlock):
                child.set_attention_slice(1)


def set_gradient_checkpointing(unet: nn.Module | None, text_encoders: Iterable[nn.Module] = ()) -> None:
    """Recompute activations in the backward pass, for the modules that are given.

    Text encoders do so in training mode only, so they are put into it: CLIP has no dropout, the numbers stay the same.
    """
    if unet is not None:
        cast(Any, unet).enable_gradient_checkpointing()
    for encoder in text_encoders:
        cast(Any, encoder).activation_checkpointing_enable({"use_reentrant": False})
        encoder.train()


def store_in_fp8(module: nn.Module) -> int:
    """Keep the weight matrices and kernels of a frozen module in float8 e4m3; each is upcast while its layer computes.

    Embeddings, norms, biases and a U-Net's first and last kernel keep their type. The gradient for a layer's
    input upcasts the weight once more, so that no upcast copy lives from the forward to the backward pass. To be called
    before networks are attached and after weights are merged. Returns how many layers were converted. Raises ValueError
    if a layer's forward was replaced.
    """
    count = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.dtype == FP8 or name in _KEPT:
            continue
        if "forward" in vars(layer):
            raise ValueError(f"{name}: its forward was replaced already; convert before networks are attached")
        # beyond 448 the type has no numbers, only NaN
        layer.weight.data = layer.weight.data.clamp(-448, 448).to(FP8)
        layer.weight.requires_grad_(False)
        layer.forward = _fp8_linear(layer) if isinstance(layer, nn.Linear) else _fp8_conv(layer)
        count += 1
    return count


def _fp8_linear(layer: nn.Linear) -> Any:
    return lambda x: _Fp8Linear.apply(x, layer.weight, layer.bias)


def _fp8_conv(layer: nn.Conv2d) -> Any:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError("only convolutions with plain zero padding can be stored in float8")
    arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return lambda x: _Fp8Conv.apply(x, layer.weight, layer.bias, arguments)


def _bias(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


class _Fp8Linear(torch.autograd.Function):
    """Linear layer with a frozen float8 weight (O, I); only the 8-bit weight is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), _bias(bias, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class _Fp8Conv(torch.autograd.Function):
    """Convolution with a frozen float8 kernel; only the 8-bit kernel is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arguments: Any) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(weight)
        ctx.shape, ctx.arguments = x.shape, arguments
        return F.conv2d(x, weight.to(x.dtype), _bias(bias, x), *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        result = conv2d_input(ctx.shape, weight.to(grad.dtype), grad.contiguous(), *ctx.arguments)
        return result, None, None, None
