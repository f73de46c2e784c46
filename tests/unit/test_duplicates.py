"""Perceptual hashes, and near ones among many without comparing all with all."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.images import read_image
from library.preparation.duplicates import groups, near_pairs
from library.preparation.looks import look_at, perceptual_hash
from tests.house.source_map import ROOT

PHOTOS = sorted((ROOT / "examples" / "photos").rglob("*.jpg"))


@given(st.integers(0, 2**64 - 1), st.lists(st.sets(st.integers(0, 63), max_size=9), max_size=12), st.integers(0, 8))
def test_the_bands_find_what_all_comparisons_find(base: int, flips: list[set[int]], distance: int):
    hashes = list({base} | {base ^ sum(1 << bit for bit in bits) for bits in flips})
    every = [
        (one, other)
        for one, other in combinations(range(len(hashes)), 2)
        if (hashes[one] ^ hashes[other]).bit_count() <= distance
    ]
    assert list(near_pairs(hashes, distance).pairs) == every


def test_twenty_thousand_images_take_a_fraction_of_all_comparisons():
    draws = random.Random(0)
    hashes = list({draws.getrandbits(64) for _ in range(20_000)})
    planted = [hashes[0] ^ 0b1011, hashes[1] ^ (1 << 63)]
    found = near_pairs([*hashes, *planted], 4)
    assert {(0, len(hashes)), (1, len(hashes) + 1)} <= set(found.pairs)
    assert found.compared < 300_000  # all with all: 200 million


def test_groups_connect_over_others():
    assert groups(6, [(4, 1), (1, 3), (0, 5)]) == [[0, 5], [1, 3, 4], [2]]


def hash_of(image: Image.Image) -> int:
    value = perceptual_hash(np.asarray(image.convert("RGB")))
    assert value is not None
    return value


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_copies_of_a_photo_stay_near(path: Path, tmp_path: Path):
    with Image.open(path) as photo:
        photo.load()
    original = hash_of(photo)
    photo.save(tmp_path / "bad.jpg", quality=40)
    with Image.open(tmp_path / "bad.jpg") as recompressed:
        assert (hash_of(recompressed) ^ original).bit_count() <= 4
    smaller = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
    assert (hash_of(smaller) ^ original).bit_count() <= 4
    brighter = photo.point([min(255, int(value * 1.1)) for value in range(256)] * 3)
    assert (hash_of(brighter) ^ original).bit_count() <= 6


def test_different_photos_are_far_apart():
    hashes = [perceptual_hash(read_image(str(path))) for path in PHOTOS if path.parent.name == "1_photo"]
    distances = [(one ^ other).bit_count() for one, other in combinations(hashes, 2)]  # type: ignore[operator]
    assert min(distances) > 12


def test_a_picture_of_one_colour_has_no_hash_but_a_digest(tmp_path: Path):
    for name, color in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (40, 40), color).save(tmp_path / name)
    Image.new("RGB", (80, 20), "red").save(tmp_path / "d.png")
    looks = [look_at(str(tmp_path / name)) for name in ("a.png", "b.png", "c.png", "d.png")]
    assert {look.hash for look in looks} == {None}
    assert looks[0].digest == looks[1].digest
    assert len({look.digest for look in looks}) == 3


def test_transparency_is_what_lets_something_through(tmp_path: Path):
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 254)).save(tmp_path / "glass.png")
    palette = Image.new("P", (8, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    files = sorted(tmp_path.iterdir())
    assert [file.stem for file in files if look_at(str(file)).is_transparent] == ["glass", "palette"]
