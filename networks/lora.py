"""LoRA: the weight difference of a layer as a product of two thin matrices, ΔW = alpha/rank · up · down.

LoRA-LierLa adapts Linear layers and 1x1 convolutions; LoRA-C3Lier (with ``conv_dim``) also 3x3 convolutions and
the rest of the U-Net's blocks. E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
section 4.1. The Tucker form of a convolution, ``up · (mid * (down · x))``, has its kernel in a core of R x R channels:
N. Hyeon-Woo et al., "FedPara", arXiv:2108.06098, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts, Factor
from networks.dora import Decomposed
from networks.factory import NetworkFactory
from networks.lowrank import product_norm
from networks.network_args import Reader, truth
from networks.products import row_squares, with_core


class LoraAdapter(Adapter):
    """``y + factor · up(down(x))``; ``down`` starts as noise and ``up`` as zero, so a new adapter changes nothing.

    The factors may have another type than layer and activations: they are cast, which is cheap since they are small.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("alpha", "lora_down.weight", "lora_up.weight")
    optional_names: ClassVar[tuple[str, ...]] = ("lora_mid.weight",)
    plus_names: ClassVar[tuple[str, ...]] = ("lora_up.weight",)
    arguments: ClassVar[Mapping[str, Reader]] = {"use_tucker": truth}

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        size: AdapterSize,
        multiplier: float = 1.0,
        dropouts: Dropouts = NO_DROPOUT,
        use_tucker: bool = False,
    ) -> None:
        super().__init__(name, layer, size, multiplier, dropouts)
        self._mid: dict[str, nn.Parameter | None] | None = None
        if isinstance(layer, nn.Conv2d):
            kernel = tuple(layer.kernel_size)
            has_core = use_tucker and kernel != (1, 1)
            self.lora_down = Factor(size.rank, layer.in_channels, *((1, 1) if has_core else kernel))
            if has_core:
                self.lora_mid = Factor(size.rank, size.rank, *kernel)
                self._mid = self.lora_mid.slot
            self.lora_up = Factor(layer.out_channels, size.rank, 1, 1)
        elif isinstance(layer, nn.Linear):
            self.lora_down = Factor(size.rank, layer.in_features)
            self.lora_up = Factor(layer.out_features, size.rank)
        else:
            raise TypeError(f"{name}: LoRA adapts Linear and Conv2d layers, not {type(layer).__name__}")
        # read from these in the forward pass: nn.Module's attribute access is slow, and parameters may be replaced
        self._down, self._up = self.lora_down.slot, self.lora_up.slot

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors["lora_down.weight"].shape[0]

    @classmethod
    def layer_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        if up.shape[1] != down.shape[0]:
            raise ValueError("up and down have different ranks")
        return (up.shape[0], down.shape[1], *tensors.get("lora_mid.weight", down).shape[2:])

    @classmethod
    def structure_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"use_tucker": True} if "lora_mid.weight" in tensors else {}

    def start(self) -> None:
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))  # uniform within ±1/sqrt(fan_in)
        if self._mid is not None:
            nn.init.kaiming_uniform_(self.lora_mid.weight, a=math.sqrt(5))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Both trained factors as matrices (O, R) and (R, I·K·K)."""
        down_RI = self.lora_down.weight.flatten(1)
        if self._mid is not None:
            down_RI = with_core(self.lora_mid.weight, down_RI)
        return self.lora_up.weight.flatten(1), down_RI

    def factors(self) -> tuple[Tensor, Tensor] | None:
        up_OR, down_RI = self.matrices()
        return up_OR.float() * self.scale, down_RI.float()

    def delta_weight(self) -> Tensor:
        up_OR, down_RI = self.matrices()
        product = (up_OR.float() * self.scale) @ down_RI.float()
        return product.view(self.layer.weight.shape)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def delta_norm(self) -> Tensor:
        return product_norm(*self.matrices()) * abs(self.scale)

    @torch.no_grad()
    def scale_delta_(self, ratio: Tensor) -> None:
        root = ratio.sqrt()
        self.lora_up.weight.mul_(root)
        self.lora_down.weight.mul_(root)

    def combine(self, y: Tensor, x: Tensor) -> Tensor:
        down, up = self._down["weight"], self._up["weight"]
        assert down is not None
        assert up is not None
        return self._add(y, x, down, up)

    def _add(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """The adapted output with these factors, which may be the adapter's own or parts of them."""
        is_dropping = self.training and self.dropouts is not NO_DROPOUT
        if not (self._is_conv or is_dropping):
            rows_NO, rows_NI = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            return cast(Tensor, _AddLowRank.apply(rows_NO, rows_NI, down, up, self.factor)).view(y.shape)
        hidden = self._hidden(x, down.to(y.dtype))
        hidden = self._dropped(hidden) if is_dropping else hidden * self.factor
        return y + self._lifted(hidden, up)

    def change(self, x: Tensor) -> Tensor:
        down, up = self._down["weight"], self._up["weight"]
        assert down is not None
        assert up is not None
        hidden = self._hidden(x, down.to(x.dtype))
        is_dropping = self.training and self.dropouts is not NO_DROPOUT
        return self._lifted((self._masked(hidden) if is_dropping else hidden) * self.scale, up)

    def _hidden(self, x: Tensor, down: Tensor) -> Tensor:
        """Rank activations, (..., R) or (B, R, H, W), without any scale."""
        if self._mid is None:
            return self._operate(x, down)
        mid = self._mid["weight"]
        assert mid is not None
        return self._operate(F.conv2d(x, down), mid.to(down.dtype))

    def _lifted(self, hidden: Tensor, up: Tensor) -> Tensor:
        up = up.to(hidden.dtype)
        return F.conv2d(hidden, up) if self._is_conv else F.linear(hidden, up)

    def _dropped(self, hidden: Tensor) -> Tensor:
        """Rank activations after the dropouts and times the strength."""
        # a skipped adapter is zero, not absent: every process has every gradient
        return self._masked(hidden) * (0.0 if self.is_skipped else self.factor)

    def _masked(self, hidden: Tensor) -> Tensor:
        if self.dropouts.neuron:
            hidden = F.dropout(hidden, self.dropouts.neuron)
        if self.dropouts.rank:
            rank = hidden.shape[1 if self._is_conv else -1]
            kept_BR = torch.rand(hidden.shape[0], rank, device=hidden.device) > self.dropouts.rank
            spread = (-1, rank, 1, 1) if self._is_conv else (-1, *(1,) * (hidden.dim() - 2), rank)
            hidden = hidden * kept_BR.view(spread) / (1.0 - self.dropouts.rank)
        return hidden


class _AddLowRank(torch.autograd.Function):
    """y (N, O) + factor · up · down · x (N, I), one fused product, scale and sum.

    Factors of another type than ``y`` are cast once more in the backward pass: autograd would keep the cast copies of
    all adapters until then, with float32 factors half of what the whole network takes. The input is kept only if
    ``down`` learns.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: float) -> Tensor:  # pyright: ignore
        hidden_NR = F.linear(x, down.to(y.dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, hidden_NR, down, up)
        ctx.factor = factor
        return torch.addmm(y, hidden_NR, up.to(y.dtype).t(), alpha=factor)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, hidden_NR, down, up = ctx.saved_tensors
        of_hidden_NR = (grad_NO @ up.to(grad_NO.dtype)).mul_(ctx.factor)
        of_x = of_hidden_NR @ down.to(grad_NO.dtype) if ctx.needs_input_grad[1] else None
        of_up = (grad_NO.t() @ hidden_NR).mul_(ctx.factor) if ctx.needs_input_grad[3] else None
        of_down = of_hidden_NR.t() @ x if ctx.needs_input_grad[2] else None
        return grad_NO, of_x, of_down, of_up, None


class DoraLora(Decomposed, LoraAdapter):
    """LoRA with trained magnitudes (DoRA). The norms come from small products, never from the whole weight."""

    tensor_names: ClassVar[tuple[str, ...]] = ("dora_scale", *LoraAdapter.tensor_names)
    arguments: ClassVar[Mapping[str, Reader]] = {**LoraAdapter.arguments, **Decomposed.arguments}

    @torch.no_grad()
    def direction_norms(self) -> Tensor:
        if not self.is_per_output:
            return super().direction_norms()
        weight_OI, squares = self.own_squares()
        up_OR, down_RI = self.matrices()
        squares_O = row_squares(weight_OI, squares.flatten(), up_OR * self.scale, down_RI)
        return squares_O.clamp(min=0).sqrt().view(squares.shape)


_FACTORY = NetworkFactory("networks.lora", LoraAdapter, {"dora_wd": DoraLora})
create_network = _FACTORY.create_network
create_network_from_weights = _FACTORY.create_network_from_weights
reads, inspect_weights = _FACTORY.reads, _FACTORY.inspect_weights
