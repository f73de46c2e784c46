"""Bucket tables and fits: laws that hold for every setting and image."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.data.buckets import bucket_sizes, cover, fit, fit_to, letterbox
from library.data.records import BucketRules

SIDES = st.integers(1, 6000)
SIZES = st.tuples(SIDES, SIDES)
STEPS = st.sampled_from([8, 16, 32, 64])


@st.composite
def bucket_rules(draw: st.DrawFn) -> BucketRules:
    return BucketRules(
        resolution=(draw(st.integers(64, 1536)), draw(st.integers(64, 1536))),
        enable_bucket=draw(st.booleans()),
        min_bucket_reso=draw(st.integers(8, 512)),
        max_bucket_reso=draw(st.integers(512, 2048)),
        bucket_reso_steps=draw(STEPS),
        bucket_no_upscale=draw(st.booleans()),
    )


@given(bucket_rules(), SIZES)
def test_bucket_is_covered_and_divisible(rules: BucketRules, size: tuple[int, int]) -> None:
    ours = fit(size, rules, bucket_sizes(rules))
    step = rules.bucket_reso_steps if rules.enable_bucket else 8
    assert ours.bucket[0] % step == 0
    assert ours.bucket[1] % step == 0
    assert min(ours.bucket) >= step
    assert ours.resized[0] >= ours.bucket[0]
    assert ours.resized[1] >= ours.bucket[1]


@given(bucket_rules(), SIZES)
@example(BucketRules((64, 359), True, bucket_reso_steps=8, bucket_no_upscale=True), (152, 152))
@example(BucketRules((426, 442), True, 8, 512, bucket_reso_steps=8, bucket_no_upscale=True), (434, 512))
def test_area_stays_below_the_resolution(rules: BucketRules, size: tuple[int, int]) -> None:
    bucket = fit(size, rules, bucket_sizes(rules)).bucket
    step = rules.bucket_reso_steps if rules.enable_bucket else 8
    # sides are rounded to pixels first, as in the common rule, and the second follows from the first: half a pixel too
    # much of one, then half a pixel of its own
    area = (bucket[0] - 0.5) * (bucket[1] - 0.5)
    assert area <= max(rules.resolution[0] * rules.resolution[1], step * step) + max(bucket) / 2


@given(SIZES, STEPS)
def test_no_upscale_never_enlarges_an_image_of_a_step_or_more(size: tuple[int, int], step: int) -> None:
    rules = BucketRules((512, 512), True, bucket_reso_steps=step, bucket_no_upscale=True)
    ours = fit(size, rules, ())
    if min(size) >= step and size[0] * size[1] <= 512 * 512:
        assert ours.resized == size
        assert 0 <= size[0] - ours.bucket[0] < step
        assert 0 <= size[1] - ours.bucket[1] < step
    elif min(ours.resized) > step:
        assert ours.resized[0] <= size[0]
        assert ours.resized[1] <= size[1]


@given(SIZES, SIZES)
def test_cover_is_tight_on_one_side(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    resized = cover(size, bucket)
    assert resized[0] >= bucket[0]
    assert resized[1] >= bucket[1]
    assert abs(resized[0] - bucket[0]) <= 1 or abs(resized[1] - bucket[1]) <= 1


@given(SIZES, SIZES)
def test_letterbox_lies_in_the_bucket(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    left, top, right, bottom = letterbox(size, bucket)
    assert 0 <= left <= right <= bucket[0] + 1e-6
    assert 0 <= top <= bottom <= bucket[1] + 1e-6
    assert right - left == pytest.approx(bucket[0]) or bottom - top == pytest.approx(bucket[1])


@given(bucket_rules())
def test_table_is_symmetric_and_sorted(rules: BucketRules) -> None:
    sizes = bucket_sizes(rules)
    assert list(sizes) == sorted(set(sizes))
    if rules.enable_bucket:
        assert {(height, width) for width, height in sizes} == set(sizes)


def test_limits_are_rounded_inwards_to_the_step() -> None:
    sides = {side for size in bucket_sizes(BucketRules((512, 512), True, 300, 1000, 64)) for side in size}
    assert min(sides) == 320
    assert max(sides) == 768
    assert max(max(size) for size in bucket_sizes(BucketRules((1024, 1024), True, 64, 1100, 64))) == 1088


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1920, 1080), (640, 384), (683, 384)),
        ((1000, 1500), (384, 576), (384, 576)),
        ((333, 500), (320, 448), (333, 500)),
        ((700, 500), (512, 384), (538, 384)),
        ((3000, 500), (1152, 192), (1152, 192)),
        ((40, 700), (64, 1088), (64, 1120)),
        ((60, 60), (64, 64), (64, 64)),
        ((10000, 20), (4096, 64), (32000, 64)),
    ],
)
def test_no_upscale_values(size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int]) -> None:
    ours = fit(size, BucketRules((512, 512), True, bucket_no_upscale=True), ())
    assert (ours.bucket, ours.resized) == (bucket, resized)


def test_an_image_of_just_the_area_keeps_its_size_without_upscaling() -> None:
    ours = fit((500, 500), BucketRules((500, 500), True, bucket_no_upscale=True), ())
    assert (ours.bucket, ours.resized) == ((448, 448), (500, 500))


def test_the_square_of_the_table_is_within_the_area() -> None:
    assert (448, 448) in (sizes := bucket_sizes(BucketRules((640, 409), True)))  # a side of 511.6
    assert max(width * height for width, height in sizes) <= 640 * 409


def test_without_buckets_every_image_covers_the_one_size() -> None:
    rules = BucketRules((500, 300))
    assert bucket_sizes(rules) == ((496, 296),)
    for size in ((100, 100), (4000, 200), (496, 296)):
        ours = fit(size, rules, bucket_sizes(rules))
        assert ours == fit_to(size, (496, 296))
        assert ours.bucket == (496, 296)


def test_an_image_of_a_size_in_the_table_keeps_it() -> None:
    rules = BucketRules((512, 512), True)
    sizes = bucket_sizes(rules)
    assert (704, 320) in sizes
    for size in sizes:
        ours = fit(size, rules, sizes)
        assert (ours.bucket, ours.resized, ours.ar_error) == (size, size, 0)


def test_an_image_without_area_is_refused() -> None:
    with pytest.raises(ValueError, match="no area"):
        fit((0, 10), BucketRules((512, 512)), ((512, 512),))
