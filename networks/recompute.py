"""Trade time for memory: a piece of the forward pass that keeps only its input and computes the rest once more.

Types of adapters whose weight difference is as large as the layer's own weight use it: kept until the backward pass,
those differences together would be as large as the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, parameters: tuple[nn.Parameter, ...]) -> Tensor:
    """``function(x)``, of which only ``x`` is kept; ``parameters`` are all others that it reads and that may learn."""
    return cast(Tensor, _Recomputed.apply(function, x, *parameters))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:  # pyright: ignore
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            again = x.detach().requires_grad_(needed[0])
            y = ctx.function(again)
        wanted = [tensor for tensor, is_needed in zip((again, *parameters), needed, strict=True) if is_needed]
        # the forward pass may have run under autocast, which the backward pass does not
        found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), allow_unused=True))
        return (None, *(next(found) if is_needed else None for is_needed in needed))
