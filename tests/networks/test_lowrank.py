"""Low-rank algebra against the dense product."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from networks.lowrank import product_norm, product_svd, stacked_product

sides = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def pair(seed: int, out: int, rank: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return up, torch.randn(rank, inner, generator=generator, dtype=torch.float64)


@given(seeds, sides, sides, sides)
def test_norm(seed: int, out: int, rank: int, inner: int) -> None:
    up, down = pair(seed, out, rank, inner)
    torch.testing.assert_close(product_norm(up, down), (up @ down).norm())
    up, down = up.float(), down.float()
    error = product_norm(up, down).double().square() - (up.double() @ down.double()).square().sum()
    assert error.abs() < 1e-6 * up.norm().square() * down.norm().square()  # a small product is left of large terms


@given(seeds, sides, sides, sides)
def test_svd_rebuilds_the_product(seed: int, out: int, rank: int, inner: int) -> None:
    up, down = pair(seed, out, rank, inner)
    svd = product_svd(up, down).first(min(out, rank, inner))
    torch.testing.assert_close(svd.left_OR @ torch.diag(svd.singular_R) @ svd.right_RI, up @ down)
    dense = torch.linalg.svdvals(up @ down)[: len(svd.singular_R)]
    torch.testing.assert_close(svd.singular_R, dense, atol=1e-9, rtol=1e-9)
    assert len(svd.singular_R) == min(out, rank, inner)
    identity = torch.eye(len(svd.singular_R), dtype=torch.float64)
    torch.testing.assert_close(svd.left_OR.T @ svd.left_OR, identity)
    torch.testing.assert_close(svd.right_RI @ svd.right_RI.T, identity)


@given(seeds, sides, sides, sides)
def test_float32_is_right_to_its_last_digits(seed: int, out: int, rank: int, inner: int) -> None:
    up, down = (part.float() for part in pair(seed, out, rank, inner))
    product = up.double() @ down.double()
    svd = product_svd(up, down)
    assert svd.singular_K.dtype == torch.float32
    dense = torch.linalg.svdvals(product)[: len(svd.singular_K)]
    assert len(svd.singular_K) == min(out, rank, inner)
    torch.testing.assert_close(svd.singular_K.double(), dense, rtol=1e-6, atol=1e-7 * float(dense[0]))
    for new_up, new_down in (svd.truncated(99), svd.split(99)):
        assert float((new_up.double() @ new_down.double() - product).norm()) <= 5e-7 * float(product.norm())


def test_factors_that_are_not_of_full_rank() -> None:
    """The same network twice, and ranks that are zero: the Gram matrices are singular."""
    up, down = (part.float() for part in pair(1, 9, 3, 8))
    twice = product_svd(*stacked_product([(0.5, up, down), (0.5, up, down)]))
    new_up, new_down = twice.split(3)
    torch.testing.assert_close(new_up @ new_down, up @ down, rtol=1e-5, atol=1e-5)
    assert float(twice.singular_K[3]) < 1e-6 * float(twice.singular_K[0])
    up[:, 2] = 0
    down[1] = 0
    holed = product_svd(up, down)
    torch.testing.assert_close(torch.mm(*holed.truncated(3)), up @ down, rtol=1e-5, atol=1e-5)
    nothing = product_svd(torch.zeros(5, 2), torch.zeros(2, 4)).truncated(2)
    assert not any(bool(part.any()) for part in nothing)


@given(seeds, st.integers(1, 4))
def test_truncation_is_the_best_approximation(seed: int, rank: int) -> None:
    up, down = pair(seed, 9, 5, 7)
    small_up, small_down = product_svd(up, down).truncated(rank)
    assert small_up.shape == (9, rank)
    assert small_down.shape == (rank, 7)
    left_over = torch.linalg.svdvals(up @ down)[rank:].norm()
    torch.testing.assert_close((up @ down - small_up @ small_down).norm(), left_over)
    torch.testing.assert_close(small_up.norm(dim=0), small_down.norm(dim=1))  # shared out evenly


@given(seeds, st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 5)), min_size=1, max_size=4))
def test_stacked_product_is_the_exact_sum(seed: int, terms: list[tuple[float, int]]) -> None:
    pairs = [(factor, *pair(seed + index, 6, rank, 8)) for index, (factor, rank) in enumerate(terms)]
    up, down = stacked_product(pairs)
    assert up.shape[1] == sum(rank for _, rank in terms)
    expected = torch.stack([factor * (u @ d) for factor, u, d in pairs]).sum(0)
    torch.testing.assert_close(up @ down, expected)


def test_zero_product_has_norm_zero() -> None:
    assert product_norm(torch.zeros(5, 2), torch.randn(2, 5)) == 0
