"""How many singular values are kept, by values that can be checked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from networks.ranks import RankRule, kept_count, kept_share, numerical_rank

# sum 20; squares 64 + 36 + 16 + 4 = 120
VALUES = torch.tensor([8.0, 6.0, 4.0, 2.0])


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (None, 4),
        (RankRule("sv_ratio", 4.0), 3),  # larger than 2, so 2 itself is out
        (RankRule("sv_ratio", 4.1), 4),
        (RankRule("sv_ratio", 1.5), 2),
        (RankRule("sv_ratio", 1.0), 1),
        (RankRule("sv_cumulative", 0.4), 1),  # 8/20 is enough
        (RankRule("sv_cumulative", 0.41), 2),
        (RankRule("sv_cumulative", 0.7), 2),  # 14/20
        (RankRule("sv_cumulative", 0.9), 3),  # 18/20
        (RankRule("sv_cumulative", 1.0), 4),
        (RankRule("sv_fro", 0.73), 1),  # sqrt(64/120) = 0.7303
        (RankRule("sv_fro", 0.74), 2),
        (RankRule("sv_fro", 0.9128), 2),  # sqrt(100/120) = 0.91287
        (RankRule("sv_fro", 0.98), 3),  # sqrt(116/120) = 0.98319
        (RankRule("sv_fro", 1.0), 4),
    ],
)
def test_counts_are_exact(rule: RankRule | None, count: int) -> None:
    assert kept_count(VALUES, 10, rule) == count


def test_limits() -> None:
    assert kept_count(VALUES, 3) == 3
    assert kept_count(VALUES, 2, RankRule("sv_fro", 1.0)) == 2
    assert kept_count(torch.tensor([5.0, 1e-9, 1e-9]), 8) == 1  # noise is not padded with
    assert kept_count(torch.zeros(4), 8) == 1
    assert kept_count(torch.zeros(4), 8, RankRule("sv_cumulative", 0.9)) == 1
    assert numerical_rank(torch.zeros(4)) == 0
    assert numerical_rank(torch.zeros(0)) == 0
    assert numerical_rank(VALUES) == 4


def test_shares() -> None:
    kept = kept_share(VALUES, 2)
    assert kept.sum_share == pytest.approx(0.7)
    assert kept.frobenius_share == pytest.approx((100 / 120) ** 0.5)
    assert kept.max_ratio == pytest.approx(8 / 6)
    zero = kept_share(torch.zeros(3), 1)
    assert (zero.sum_share, zero.frobenius_share, zero.max_ratio) == (1.0, 1.0, 1.0)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1))
def test_a_rule_keeps_enough_and_not_one_more(values: list[float], target: float) -> None:
    singular = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for method in ("sv_fro", "sv_cumulative"):
        count = kept_count(singular, 100, RankRule(method, target))
        shares = [kept_share(singular, rank) for rank in range(1, len(singular) + 1)]
        reached = [kept.frobenius_share if method == "sv_fro" else kept.sum_share for kept in shares]
        assert reached[count - 1] >= target - 1e-9
        assert count == 1 or reached[count - 2] < target + 1e-9
