"""Near duplicates among many images by the Hamming distance of their hashes, without comparing all with all.

Two hashes that differ in at most d bits, cut into d + 1 bands, have one band in common bit by bit: d changes cannot
touch all (M. Norouzi, A. Punjani, D. Fleet, Fast Search in Hamming Space with Multi-Index Hashing, 2012). So only
hashes that share a band are compared. With d = 4 a band has 12 or 13 bits: of 20,000 hashes about 4 share one by
chance, which makes some 200,000 comparisons instead of 200 million.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

HASH_BITS = 64


@dataclass(frozen=True, slots=True)
class NearPairs:
    """Pairs of positions whose hashes are near, and how many comparisons it took."""

    pairs: tuple[tuple[int, int], ...]
    compared: int


def near_pairs(hashes: Sequence[int], distance: int) -> NearPairs:
    """All pairs of different 64-bit hashes that differ in at most ``distance`` bits. ``hashes`` must not repeat."""
    pairs: set[tuple[int, int]] = set()
    compared = 0
    for shift, width in _bands(distance + 1):
        mask = (1 << width) - 1
        sharing: dict[int, list[int]] = defaultdict(list)
        for position, value in enumerate(hashes):
            sharing[value >> shift & mask].append(position)
        for positions in sharing.values():
            compared += len(positions) * (len(positions) - 1) // 2
            pairs.update(
                pair
                for pair in combinations(positions, 2)
                if (hashes[pair[0]] ^ hashes[pair[1]]).bit_count() <= distance
            )
    return NearPairs(tuple(sorted(pairs)), compared)


def groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Positions that pairs connect, directly or over others: each position in one group, in order."""
    parent = list(range(count))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    for one, other in pairs:
        parent[root(one)] = root(other)
    members: dict[int, list[int]] = defaultdict(list)
    for position in range(count):
        members[root(position)].append(position)
    return sorted(members.values())


def _bands(count: int) -> list[tuple[int, int]]:
    """(shift, width) of bands that cover all bits, as equal as can be."""
    edges = [HASH_BITS * number // count for number in range(count + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]
