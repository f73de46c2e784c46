"""LoRA-FA: a LoRA whose ``down`` stays the random projection that it was drawn as; only ``up`` learns.

ΔW = alpha/rank · U · D with D fixed: what a layer gets as input need not be kept for the backward pass, only the rank
activations D·x. L. Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
arXiv:2308.03303. Files are those of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from networks.factory import NetworkFactory
from networks.lora import LoraAdapter
from networks.network_args import Reader


class LoraFaAdapter(LoraAdapter):
    """``y + factor · up(down(x))``, where ``down`` is a constant of the training that is saved with the network."""

    has_own_files: ClassVar[bool] = False
    optional_names: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[Mapping[str, Reader]] = {}

    def start(self) -> None:
        """``down`` ~ Normal(0, 2/(I + R)), kernel sides not counted; ``up`` is zero."""
        rank, inputs = self.lora_down.weight.shape[:2]
        nn.init.normal_(self.lora_down.weight, std=math.sqrt(2.0 / (inputs + rank)))

    def trained_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]

    def _hidden(self, x: Tensor, down: Tensor) -> Tensor:
        if not isinstance(self.layer, nn.Conv2d):
            return super()._hidden(x, down)
        return cast(Tensor, _FixedConv.apply(x, down, self.layer))


class _FixedConv(torch.autograd.Function):
    """A convolution whose kernel does not learn; torch's own keeps its input all the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, layer: nn.Conv2d) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(kernel)
        ctx.shape, ctx.dtype, ctx.layer = x.shape, x.dtype, layer
        return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (kernel,) = ctx.saved_tensors
        layer: Any = ctx.layer
        places = layer.stride, layer.padding, layer.dilation
        of_x = conv2d_input(ctx.shape, kernel.to(grad.dtype), grad, *places)
        return of_x.to(ctx.dtype), None, None


_FACTORY = NetworkFactory("networks.lora_fa", LoraFaAdapter)
create_network = _FACTORY.create_network
create_network_from_weights = _FACTORY.create_network_from_weights
reads, inspect_weights = _FACTORY.reads, _FACTORY.inspect_weights
