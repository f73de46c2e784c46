"""What saves memory without changing the model: attention kinds, what is kept for the backward pass, gradient
checkpointing, 8-bit storage of frozen weights.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# ---- what is kept from the forward to the backward pass


def keep_less_for_backward(module: nn.Module) -> int:
    """Keep no input of frozen convolutions, and of gated GELUs only what their projection gave.

    torch's convolution keeps its input even if only the gradient for that input is asked for, which needs the kernel
    and a shape (S. Bhatia and F. Dangel, "Lowering PyTorch's Memory Consumption for Selective Differentiation",
    arXiv:2404.12406, section 3). diffusers' GEGLU, value · GELU(gate), keeps GELU(gate) beside the value and the gate;
    here it is computed once more. Outputs and gradients stay the same bit for bit.

    To be called before networks are attached. A convolution that learns, now or later, computes as before. Returns how
    many layers were changed.
    """
    from diffusers.models.activations import GEGLU

    count = 0
    for layer in module.modules():
        if "forward" in vars(layer):
            continue
        if isinstance(layer, nn.Conv2d) and _has_plain_padding(layer):
            _set_forward(layer, _conv_forward)
        elif isinstance(layer, GEGLU):
            _set_forward(layer, _gated_forward)
        else:
            continue
        count += 1
    return count


def store_in_fp8(module: nn.Module) -> int:
    """Keep the weight matrices and kernels of a frozen module in float8 e4m3; each is upcast while its layer computes.

    Embeddings, norms, biases and a U-Net's first and last kernel keep their type. The gradient for a layer's
    input upcasts the weight once more, so that no upcast copy lives from the forward to the backward pass. To be called
    before networks are attached and after weights are merged. Returns how many layers were converted. Raises ValueError
    if a layer's forward was replaced by anything but `keep_less_for_backward`.
    """
    count = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.dtype == FP8 or name in _KEPT:
            continue
        replaced = vars(layer).get("forward")
        if replaced is not None and getattr(replaced, "__func__", None) is not _conv_forward:
            raise ValueError(f"{name}: its forward was replaced already; convert before networks are attached")
        if isinstance(layer, nn.Conv2d) and not _has_plain_padding(layer):
            raise ValueError(f"{name}: only convolutions with plain zero padding can be stored in float8")
        # beyond 448 the type has no numbers, only NaN
        layer.weight.data = layer.weight.data.clamp(-448, 448).to(FP8)
        layer.requires_grad_(False)
        _set_forward(layer, _linear_forward if isinstance(layer, nn.Linear) else _conv_forward)
        count += 1
    return count


def _set_forward(layer: nn.Module, forward: Any) -> None:
    # a bound method: a deep copy of the layer gets one that is bound to the copy
    layer.forward = MethodType(forward, layer)


def _has_plain_padding(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _conv_forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if _learns(layer.weight) or _learns(layer.bias):
        return type(layer).forward(layer, x)
    arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return cast(Tensor, _FrozenConv.apply(x, layer.weight, layer.bias, arguments))


def _linear_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return cast(Tensor, _FrozenLinear.apply(x, layer.weight, layer.bias))


def _gated_forward(layer: Any, hidden_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
    return cast(Tensor, _GatedGelu.apply(layer.proj(hidden_BTD)))


def _upcast(weight: Tensor, bias: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the operation takes them: only float8 is converted, the rest is autocast's business."""
    if weight.dtype != FP8:
        return weight, bias
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype)


class _FrozenConv(torch.autograd.Function):
    """Convolution with a frozen kernel; only the kernel itself is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arguments: Any) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(weight)
        ctx.shape, ctx.arguments = x.shape, arguments
        ctx.is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, *_upcast(weight, bias, x), *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        weight = weight.to(grad.dtype)
        if ctx.is_channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        # the input's numbers do not matter, only its shape does: no memory is taken for them
        x = grad.new_empty(1).expand(ctx.shape)
        more = (None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))
        result = torch.ops.aten.convolution_backward(grad, x, weight, *more)
        return result[0], None, None, None


class _FrozenLinear(torch.autograd.Function):
    """Linear layer with a frozen float8 weight; only the 8-bit weight is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(weight)
        return F.linear(x, *_upcast(weight, bias, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class _GatedGelu(torch.autograd.Function):
    """value · GELU(gate) of (value, gate) side by side in the last axis, which alone is kept."""

    @staticmethod
    def forward(ctx: Any, projected_BTD: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(projected_BTD)
        value, gate = projected_BTD.chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        (projected_BTD,) = ctx.saved_tensors
        value, gate = projected_BTD.chunk(2, dim=-1)
        of_gate = torch.ops.aten.gelu_backward(grad * value, gate)
        return torch.cat((grad * F.gelu(gate), of_gate), dim=-1)
