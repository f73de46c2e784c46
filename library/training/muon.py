"""Muon: momentum whose matrices are orthogonalised, so that every direction of a weight learns at the same speed.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the scale of J. Liu et al.,
"Muon is scalable for LLM training" (arXiv:2502.16982, section 2.2). Vectors and word tables learn by AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
MOST_AT_ONCE = 2**24  # numbers of one shape, which bounds the extra memory
LONGEST_RATIO = 100
"""Matrices with sides of a larger ratio are tables of words or outputs, where orthogonal updates have no meaning."""


class Muon(torch.optim.Optimizer):
    """``lr`` is that of matrices (kernels of convolutions count as such); what is no matrix learns at ``adam_ratio``
    times ``lr`` by AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_ratio: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ):
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or adam_ratio < 0:
            raise ValueError("Muon: lr, weight_decay and adam_ratio must be 0 or more, momentum in 0..1 (1 excluded)")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "adam_ratio": adam_ratio, "betas": tuple(betas), "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if is_matrix(parameter):
                    shape = (parameter.shape[0], parameter[0].numel())
                    matrices.setdefault(shape, []).append(parameter)
                else:
                    self._adam(parameter, parameter.grad, group)
            for (rows, columns), alike in matrices.items():
                at_once = max(1, MOST_AT_ONCE // (rows * columns))
                for first in range(0, len(alike), at_once):
                    self._muon(alike[first : first + at_once], group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update weights of one shape together: small matrices one by one are slow."""
        directions: list[Tensor] = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(buffer, group["momentum"]).flatten(1))
        updates = orthogonal(torch.stack(directions))
        # The mean square of an orthogonal matrix falls with its longer side; 0.2 is what AdamW's updates have.
        scale = 0.2 * math.sqrt(max(updates.shape[1:]))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.add_(update.view_as(parameter).to(parameter.dtype), alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (first, second) = state["step"].item(), group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
        deviation = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, deviation, value=-group["lr"] * group["adam_ratio"] / (1 - first**step))


def is_matrix(parameter: Tensor) -> bool:
    """True for weights (out, in) and kernels (out, in, height, width) whose updates are orthogonalised."""
    if parameter.ndim < 2:
        return False
    rows, columns = parameter.shape[0], parameter[0].numel()
    return max(rows, columns) <= LONGEST_RATIO * min(rows, columns)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the orthogonal factors of the polar decompositions of matrices (N, rows, columns).

    Singular values become 0.7 to 1.2, whatever they were, by five rounds of a Newton-Schulz iteration of degree five,
    with the coefficients of K. Jordan et al. Values thousands of times smaller than the largest one end lower.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    wide = (matrices.mT if tall else matrices).float()
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide
