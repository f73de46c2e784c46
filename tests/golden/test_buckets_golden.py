"""Bucket tables and choices of the reference, reproduced by the default rule."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from library.data.buckets import bucket_sizes, fit
from library.data.records import BucketRules

DATA = Path(__file__).parent / "data" / "dataset"


def load(name: str) -> Any:
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


GROUPS = load("buckets")


def rules_of(settings: dict[str, Any]) -> BucketRules:
    return BucketRules(
        resolution=tuple(settings["max_reso"]),
        enable_bucket=True,
        min_bucket_reso=settings["min_size"] or 256,
        max_bucket_reso=settings["max_size"] or 1024,
        bucket_reso_steps=settings["reso_steps"],
        bucket_no_upscale=settings["no_upscale"],
    )


@pytest.mark.parametrize("case", load("make_bucket_resolutions"), ids=lambda case: str(case["args"]))
def test_table(case: dict[str, Any]) -> None:
    resolution, smallest, largest, step = case["args"]
    rules = BucketRules(tuple(resolution), True, smallest, largest, step)
    assert list(bucket_sizes(rules)) == [tuple(size) for size in case["resos"]]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: str(group["settings"]))
def test_choice_size_and_box(group: dict[str, Any]) -> None:
    rules = rules_of(group["settings"])
    sizes = bucket_sizes(rules)
    checked = 0
    for row in group["rows"]:
        ours = fit(tuple(row["size"]), rules, sizes)
        if min(row["bucket"]) == 0:
            # The reference gives a side of 0 to an image thinner than one step; ours is one step wide.
            assert min(ours.bucket) == rules.bucket_reso_steps
            continue
        assert ours.bucket == tuple(row["bucket"]), row
        assert ours.resized == tuple(row["resized"]), row
        assert ours.ar_error == pytest.approx(row["ar_error"], abs=1e-12), row
        assert ours.crop_ltrb == pytest.approx(row["crop_ltrb"], abs=1e-9), row
        checked += 1
    assert checked >= 199


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "box"),
    [
        ((1920, 1080), (1344, 768), (1365, 768), (0, 6, 1344, 762)),
        ((800, 1200), (832, 1216), (832, 1248), (10, 0, 820.667, 1216)),
        ((4000, 3000), (1152, 896), (1195, 896), (0, 16, 1152, 880)),
    ],
)
def test_boxes_at_1024(
    size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int], box: tuple[float, ...]
) -> None:
    rules = BucketRules((1024, 1024), True, 512, 2048, 64)
    ours = fit(size, rules, bucket_sizes(rules))
    assert (ours.bucket, ours.resized) == (bucket, resized)
    assert ours.crop_ltrb == pytest.approx(box, abs=1e-3)
