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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if is_matrix(parameter):
                    self._muon(parameter, parameter.grad, group)
                else:
                    self._adam(parameter, parameter.grad, group)
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(buffer, group["momentum"]).flatten(1))
        # The mean square of an orthogonal matrix falls with its longer side; 0.2 is what AdamW's updates have.
        scale = 0.2 * math.sqrt(max(update.shape))
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


def orthogonal(matrix: Tensor) -> Tensor:
    """About the orthogonal factor of the polar decomposition: singular values between 0.7 and 1.2 instead of any.

    Five rounds of a Newton-Schulz iteration of degree five, with the coefficients of K. Jordan et al. Values that are
    thousands of times smaller than the largest one end lower.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).float()
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(ROUNDS):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide.T if tall else wide
