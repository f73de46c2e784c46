"""Seeds are a function of the run's seed and the names, and stay what they are: a resumed run draws as before."""

from __future__ import annotations

import random

import torch

from library.rng import seed_of, stream, torch_stream


def test_names_their_order_and_their_types_tell_seeds_apart() -> None:
    names = [("a",), ("a", "b"), ("b", "a"), ("ab",), ("a", 1), ("a", "1"), ("a", 11), ("a", 1, 1), ()]
    seeds = {seed_of(seed, *of) for seed in (0, 1, -1) for of in names}
    assert len(seeds) == 3 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_are_their_seeds_alone() -> None:
    random.seed(1)
    torch.manual_seed(1)
    assert stream(7, "noise").random() == random.Random(seed_of(7, "noise")).random()
    assert torch_stream(7, "noise").initial_seed() == seed_of(7, "noise")
    assert torch.initial_seed() == 1


def test_check_value() -> None:
    """Another one would change every draw of every run that is resumed."""
    assert seed_of(7, "noise", 1, "a.png", 0) == 1_172_285_423_349_180_268
