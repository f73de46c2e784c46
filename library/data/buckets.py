"""Buckets: which training size an image gets and how it fills it. Pure arithmetic over sizes (width, height) in pixels.

The rules are those of the reference for every setting in which the reference gives usable sizes. Where it does not,
we do: the smallest and largest side are rounded inwards to the step, no side falls below one step, and without
buckets every image is scaled to cover the one size (cached or not).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from library.data.records import LATENT_STRIDE, BucketRules, Fit, Size


def bucket_sizes(rules: BucketRules) -> tuple[Size, ...]:
    """The table of training sizes, ascending. Empty with ``bucket_no_upscale``: sizes then arise from the images.

    With buckets: the square of about the area of ``resolution``, and for each width from the smallest to the largest
    side the greatest height (a multiple of the step, at most the largest side) within the area, both ways round.
    Without: the one size ``resolution``, its sides reduced to multiples of 8.
    """
    width, height = rules.resolution
    if not rules.enable_bucket:
        return ((_floor_to(width, LATENT_STRIDE), _floor_to(height, LATENT_STRIDE)),)
    if rules.bucket_no_upscale:
        return ()
    step, area = rules.bucket_reso_steps, width * height
    smallest = max(step, math.ceil(rules.min_bucket_reso / step) * step)
    largest = rules.max_bucket_reso // step * step
    square = _floor_to(int(math.sqrt(area)), step)
    sizes = {(square, square)}
    for side in range(smallest, largest + 1, step):
        other = min(largest, area // side // step * step)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def fit(size: Size, rules: BucketRules, sizes: Sequence[Size]) -> Fit:
    """How an image of ``size`` fills its bucket. ``sizes`` is the table that `bucket_sizes` gave for the same rules.

    The image is scaled to the smallest size that covers the bucket, then cropped. Raises ValueError for an empty image.
    """
    if min(size) < 1:
        raise ValueError(f"an image of {size[0]}x{size[1]} pixels has no area")
    if rules.enable_bucket and rules.bucket_no_upscale:
        return _fit_without_upscaling(size, rules)
    return fit_to(size, size if size in sizes else nearest_ratio(size, sizes))


def fit_to(size: Size, bucket: Size) -> Fit:
    """How an image fills a bucket that is already chosen."""
    return _as_fit(size, bucket, cover(size, bucket))


def nearest_ratio(size: Size, sizes: Sequence[Size]) -> Size:
    """The entry whose width/height is nearest to the image's; the first of equals."""
    ratio = size[0] / size[1]
    return min(sizes, key=lambda entry: abs(entry[0] / entry[1] - ratio))


def cover(size: Size, bucket: Size) -> Size:
    """The smallest scaled size that covers the bucket, rounded to pixels."""
    width, height = size
    if width / height > bucket[0] / bucket[1]:
        scale = bucket[1] / height
    else:
        scale = bucket[0] / width
    return max(_round(width * scale), bucket[0]), max(_round(height * scale), bucket[1])


def letterbox(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) that the whole image would take inside the bucket: what the reference
    records.
    """
    ratio, (width, height) = size[0] / size[1], bucket
    if width / height > ratio:
        inner_width, inner_height = height * ratio, float(height)
    else:
        inner_width, inner_height = float(width), width / ratio
    # Rounding may make the box a hair larger than the bucket.
    left, top = max(0, math.floor((width - inner_width) / 2)), max(0, math.floor((height - inner_height) / 2))
    return float(left), float(top), left + inner_width, top + inner_height


def _fit_without_upscaling(size: Size, rules: BucketRules) -> Fit:
    step, area = rules.bucket_reso_steps, rules.resolution[0] * rules.resolution[1]
    resized = size if size[0] * size[1] <= area else _shrink(size, area, step)
    if min(resized) >= step:
        bucket = resized[0] // step * step, resized[1] // step * step
        return _as_fit(size, bucket, resized)
    # Thinner than one step: the short side grows to the step, and the long side is cut to what the area allows.
    scale = step / min(resized)
    longest = max(step, area // step // step * step)
    sides = [min(longest, _floor_to(_round(side * scale), step)) for side in resized]
    return fit_to(size, (sides[0], sides[1]))


def _shrink(size: Size, area: int, step: int) -> Size:
    """The image reduced to about ``area`` so that one side is a multiple of the step, whichever keeps the ratio
    better.
    """
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    height = area / width
    by_width = _round(width) // step * step
    by_height = _round(height) // step * step
    width_first = by_width, _round(by_width / ratio) // step * step
    height_first = _round(by_height * ratio) // step * step, by_height
    if not (min(width_first) and min(height_first)):
        return max(1, _round(width)), max(1, _round(height))
    width_error = abs(width_first[0] / width_first[1] - ratio)
    height_error = abs(height_first[0] / height_first[1] - ratio)
    if width_error < height_error:
        return by_width, _round(by_width / ratio)
    return _round(by_height * ratio), by_height


def _as_fit(size: Size, bucket: Size, resized: Size) -> Fit:
    error = bucket[0] / bucket[1] - size[0] / size[1]
    return Fit(bucket=bucket, resized=resized, crop_ltrb=letterbox(size, bucket), ar_error=error)


def _floor_to(value: int, step: int) -> int:
    return max(step, value // step * step)


def _round(value: float) -> int:
    return int(value + 0.5)
