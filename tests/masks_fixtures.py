"""Images with masks, in folders and as data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.records import (
    Augmentation,
    BucketRules,
    DatasetKind,
    DatasetSpec,
    ResolvedDataset,
    Size,
    SubsetSpec,
)
from library.data.sources import resolve
from tests.data_fixtures import picture

RULES = BucketRules((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8)


def write_mask(path: Path, grey_HW: np.ndarray) -> Path:
    """Save a mask of 0..255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey_HW.astype(np.uint8)).save(path)
    return path


def write_transparent(path: Path, pixels_HWC: np.ndarray, alpha_HW: np.ndarray) -> Path:
    """Save an image with that opacity of 0..255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.dstack([pixels_HWC, alpha_HW]).astype(np.uint8)).save(path)
    return path


def write_masked(folder: Path, sizes: Sequence[Size], mask_scale: float = 1.0, ending: str = "") -> None:
    """Images in ``folder/images``, and in ``folder/masks`` their own red channel: a mask that shows where it fits."""
    for index, size in enumerate(sizes):
        pixels = picture(size, index)
        place = folder / "images" / f"{index}{ending}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
        mask = Image.fromarray(pixels[:, :, 0])
        scaled = (round(size[0] * mask_scale), round(size[1] * mask_scale))
        (folder / "masks").mkdir(exist_ok=True)
        mask.resize(scaled, Image.Resampling.BICUBIC).save(folder / "masks" / place.name)


def subset_with(
    folder: Path, *, masked: bool = True, alpha: bool = False, augmentation: Augmentation | None = None
) -> SubsetSpec:
    """``folder/images``, with ``folder/masks`` if it is to be masked by them."""
    return SubsetSpec(
        image_dir=str(folder / "images"),
        mask_dir=str(folder / "masks") if masked else None,
        alpha_mask=alpha,
        class_tokens="thing",
        augmentation=augmentation or Augmentation(),
    )


def resolved(*subsets: SubsetSpec, rules: BucketRules = RULES, batch_size: int = 2) -> ResolvedDataset:
    """The data set of these subsets."""
    return resolve([DatasetSpec(DatasetKind.DREAMBOOTH, batch_size, rules, subsets)])[0]
