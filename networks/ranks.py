"""How many singular values of a weight change to keep, and what that keeps of it.

All functions take the singular values of one module in falling order, ``singular_R``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["sv_ratio", "sv_fro", "sv_cumulative"]


@dataclass(frozen=True, slots=True)
class RankRule:
    """Choose the rank of each module by its singular values S. ``target`` is larger than 0.

    - ``sv_ratio``: those larger than S_0 / target;
    - ``sv_fro``: as few as hold the share ``target`` of the Frobenius norm, √ΣS²;
    - ``sv_cumulative``: as few as hold the share ``target`` of the sum ΣS.
    """

    method: Method
    target: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What the first ``rank`` singular values are of all. ``max_ratio``: the largest over the smallest kept."""

    rank: int
    sum_share: float
    frobenius_share: float
    max_ratio: float


def numerical_rank(singular_R: Tensor) -> int:
    """How many are more than rounding noise: larger than S_0 · count · (the type's epsilon). 0 for a zero matrix."""
    if not len(singular_R):
        return 0
    noise = singular_R[0] * len(singular_R) * torch.finfo(singular_R.dtype).eps
    return int((singular_R > noise).sum())


def kept_count(singular_R: Tensor, limit: int, rule: RankRule | None = None) -> int:
    """How many to keep: what the rule wants (None: all), at most ``limit`` and the numerical rank, at least 1."""
    most = min(limit, numerical_rank(singular_R))
    wanted = most if rule is None else _METHODS[rule.method](singular_R.double(), rule.target)
    return max(1, min(wanted, most))


def kept_share(singular_R: Tensor, rank: int) -> Kept:
    """What the first ``rank`` are of all. A module that changes nothing is kept whole."""
    values = singular_R.double()
    if not bool(values.any()):
        return Kept(rank, 1.0, 1.0, 1.0)
    kept = values[:rank]
    ratio = float(values[0] / kept[-1]) if kept[-1] > 0 else float("inf")
    return Kept(rank, float(kept.sum() / values.sum()), float(kept.norm() / values.norm()), ratio)


def _by_ratio(values: Tensor, target: float) -> int:
    return int((values > values[0] / target).sum())


def _by_sum(values: Tensor, target: float) -> int:
    """The smallest count whose sum reaches the share."""
    sums = values.cumsum(0)
    return 1 + int((sums < target * sums[-1]).sum())


def _by_frobenius(values: Tensor, target: float) -> int:
    return _by_sum(values**2, target**2)


_METHODS: dict[Method, Callable[[Tensor, float], int]] = {
    "sv_ratio": _by_ratio,
    "sv_fro": _by_frobenius,
    "sv_cumulative": _by_sum,
}
