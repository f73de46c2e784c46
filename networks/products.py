"""What the structured types of adapters are made of: Tucker cores, Hadamard and Kronecker products of thin matrices.

Shape legend: O output width, I input width, K kernel side, R S rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TAPS = 9


def with_core(core_RSKK: Tensor, down_SI: Tensor) -> Tensor:
    """The matrix (R, I·K·K) of a Tucker pair: Σ_s core[r, s, k, l] · down[s, i]."""
    return torch.einsum("rskl,si->rikl", core_RSKK, down_SI).flatten(1).contiguous()


def hadamard_factors(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Thin matrices (O, R·S) and (R·S, I) whose product is (A₁ B₁) ∘ (A₂ B₂), exactly.

    Σ_r a₁ᵣ b₁ᵣ times Σ_s a₂ₛ b₂ₛ, multiplied out: the row-wise Khatri-Rao product of A₁ and A₂, and the column-wise one
    of B₁ and B₂.
    """
    (up1_OR, down1_RI), (up2_OS, down2_SI) = first, second
    return (up1_OR[:, :, None] * up2_OS[:, None, :]).flatten(1), (down1_RI[:, None] * down2_SI[None]).flatten(0, 1)


def row_squares(weight_OI: Tensor, squares_O: Tensor, up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """‖w_o + u_o D‖² of every row o, (O,) float32: ‖w_o‖² + 2 u_o · (D w_o) + u_o (D Dᵀ) u_oᵀ.

    ``squares_O`` are the ‖w_o‖². The product with the weight runs in the weight's own type.
    """
    crossed_OR = (weight_OI @ down_RI.to(weight_OI.dtype).T).float()
    up_OR, down_RI = up_OR.float(), down_RI.float()
    return squares_O + (up_OR * (2.0 * crossed_OR + up_OR @ (down_RI @ down_RI.T))).sum(1)


def divisors_near(width: int, factor: int) -> tuple[int, int]:
    """Two numbers, the smaller first, whose product is ``width``, for the two sides of a Kronecker product.

    ``factor`` is one of them if it divides the width; else the smaller one is the largest divisor up to ``factor`` (-1:
    without limit) and to the root of the width.
    """
    if factor > 0 and width % factor == 0:
        smaller = min(factor, width // factor)
    else:
        limit = min(math.isqrt(width), factor) if factor > 0 else math.isqrt(width)
        smaller = next(number for number in range(max(limit, 1), 0, -1) if width % number == 0)
    return smaller, width // smaller


def layer_shape_of(outputs: int, flat_inputs: int) -> tuple[int, ...]:
    """Weight shape of the layer of a file whose tensors only tell O and I·K·K.

    In the models of this program every kernel has 1 or 9 taps, and no linear layer has an input width that 9 divides.
    """
    return (outputs, flat_inputs) if flat_inputs % _TAPS else (outputs, flat_inputs // _TAPS, 3, 3)
