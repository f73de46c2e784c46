"""Truncated decompositions of dense matrices against the full one, and the bound of the randomised one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.rng import torch_stream
from networks.lowrank import FAILURE, gram_svd, randomised_svd

sides = st.integers(1, 24)
seeds = st.integers(0, 2**31)


def dense(seed: int, out: int, inner: int, decay: float = 0.0) -> torch.Tensor:
    """Singular values fall like 1/index^decay."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ torch.diag(singular / torch.arange(1, len(singular) + 1) ** decay) @ right


def best_lost(matrix: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


@given(seeds, sides, sides, st.integers(1, 24))
def test_gram_equals_the_full_decomposition(seed: int, out: int, inner: int, rank: int) -> None:
    matrix = dense(seed, out, inner, 1.0)
    svd = gram_svd(matrix, rank)
    count = min(rank, out, inner)
    assert svd.left_OR.shape == (out, count)
    assert svd.right_RI.shape == (count, inner)
    torch.testing.assert_close(svd.singular_R, torch.linalg.svdvals(matrix)[:count], rtol=1e-6, atol=1e-6)
    identity = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(svd.left_OR.T @ svd.left_OR, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(svd.right_RI @ svd.right_RI.T, identity, rtol=0, atol=1e-5)
    up, down = svd.truncated(rank)
    assert float((matrix - up @ down).norm()) <= best_lost(matrix, count) + 1e-7 * float(matrix.norm())


def test_gram_of_float32_keeps_its_digits() -> None:
    matrix = dense(3, 60, 40, 2.0).float()
    up, down = gram_svd(matrix).split(40)
    assert up.dtype == torch.float32
    assert float((matrix - up @ down).norm() / matrix.norm()) < 1e-6


@given(seeds, sides, sides, st.integers(1, 8), st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
@settings(deadline=None)
def test_bound_holds(seed: int, out: int, inner: int, rank: int, extra: int, decay: float) -> None:
    matrix = dense(seed, out, inner, decay)
    found = randomised_svd(matrix, rank, torch_stream(seed, "sketch"), oversampling=extra, power_steps=1)
    count = min(rank, out, inner)
    best = math.sqrt(max(0.0, 1 - (best_lost(matrix, count) / float(matrix.norm())) ** 2))
    assert found.kept_share <= best + 1e-9
    assert best <= found.best_share + 1e-9
    up, down = found.svd.truncated(rank)
    assert found.lost == pytest.approx(float((matrix - up @ down).norm()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("decay", "gap"), [(1.0, 0.002), (0.5, 0.03)])
def test_bound_says_something(decay: float, gap: float) -> None:
    matrix = dense(1, 300, 200, decay).float()
    found = randomised_svd(matrix, 32, torch_stream(1, "sketch"))
    assert found.best_share - found.kept_share < gap
    assert FAILURE < 1e-12


def test_exact_rank_is_found_whole() -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(90, 4, generator=generator) @ torch.randn(4, 120, generator=generator)
    found = randomised_svd(matrix, 8, torch_stream(0, "sketch"))
    assert found.lost / found.norm < 2e-6


def test_the_same_generator_gives_the_same_numbers() -> None:
    matrix = dense(2, 40, 50).float()
    first, second = (randomised_svd(matrix, 4, torch_stream(7, "a")).svd.left_OR for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_zero_and_extreme_sizes(size: float) -> None:
    zero = randomised_svd(torch.zeros(6, 7), 2, torch_stream(0, "z"))
    assert (zero.norm, zero.lost, zero.kept_share, zero.best_share) == (0.0, 0.0, 1.0, 1.0)
    assert torch.isfinite(gram_svd(torch.zeros(6, 7), 2).right_RI).all()
    found = randomised_svd(dense(4, 30, 30).float() * size, 4, torch_stream(0, "z"), oversampling=2)
    assert 0 < found.kept_share < found.best_share < 1
