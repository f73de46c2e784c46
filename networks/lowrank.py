"""Pure algebra of products ``up @ down`` of two thin matrices, without ever forming the product.

Shape legend: O output width, I flattened input width, R rank. All functions take matrices, ``up_OR`` and ``down_RI``,
and compute in float32, or in float64 if that is what they are given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def product_norm(up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """Frobenius norm of ``up @ down``, a 0-dim tensor: ||UD||² = Σ (UᵀU) ∘ (DDᵀ)."""
    up, down = _wide(up_OR), _wide(down_RI)
    # rounding may leave a tiny negative number where the product is zero
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


@dataclass(frozen=True)
class ProductSvd:
    """``product = left_OR @ diag(singular_R) @ right_RI``, singular values in falling order."""

    left_OR: Tensor
    singular_R: Tensor
    right_RI: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best approximation of that rank as (up, down); the singular values are shared out evenly to both."""
        root = self.singular_R[:rank].sqrt()
        return self.left_OR[:, :rank] * root, root[:, None] * self.right_RI[:rank]


def product_svd(up_OR: Tensor, down_RI: Tensor) -> ProductSvd:
    """Singular value decomposition of ``up @ down`` with min(O, R, I) values, through QR of both and a small core.

    U = Q₁R₁, Dᵀ = Q₂R₂, core R₁R₂ᵀ = A S Bᵀ; then left = Q₁A and right = (Q₂B)ᵀ.
    """
    q1, r1 = torch.linalg.qr(_wide(up_OR))
    q2, r2 = torch.linalg.qr(_wide(down_RI).T)
    left, singular, right = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    return ProductSvd(q1 @ left, singular, right @ q2.T)


def stacked_product(terms: Iterable[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair (up, down) whose product is exactly ``Σ factor · up @ down``; its rank is the sum of the ranks."""
    parts = [(factor * _wide(up), _wide(down)) for factor, up, down in terms]
    return torch.cat([up for up, _ in parts], dim=1), torch.cat([down for _, down in parts], dim=0)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()
