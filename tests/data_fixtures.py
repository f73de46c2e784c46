"""Small data sets for tests of the pixel side: pictures on disk, records, and a VAE that is cheap and traceable."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from library.data.records import (
    Augmentation,
    CaptionRules,
    DatasetKind,
    DatasetSpec,
    Fit,
    ImageRecord,
    ResolvedDataset,
    Size,
    SubsetSpec,
)


def picture(size: Size, seed: int = 0) -> np.ndarray:
    """A smooth picture that differs everywhere from its mirror image."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    shift = (seed * 37 % 97) / 97
    planes = [x, y, (x * y + shift) % 1.0]
    return (np.stack(planes, axis=-1) * 255).astype(np.uint8)


def write_picture(path: Path, size: Size, seed: int = 0) -> Path:
    """Save a `picture` in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(size, seed)).save(path)
    return path


def cover_fit(size: Size, bucket: Size) -> Fit:
    """A fit that covers the bucket, as the bucket rules make it."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5)))
    return Fit(bucket, resized, (0.0, 0.0, float(bucket[0]), float(bucket[1])), 0.0)


def record(path: Path, size: Size, *, key: str | None = None, reg: bool = False, subset: int = 0) -> ImageRecord:
    """A record with a caption of several tags."""
    return ImageRecord(key or str(path), str(path), size, f"{path.stem}, one, two, three", 1, reg, subset)


def dataset(
    records: list[ImageRecord],
    fits: list[Fit],
    *,
    augmentation: Augmentation | None = None,
    captions: CaptionRules | None = None,
    subsets: int = 1,
    batch_size: int = 2,
    prior_loss_weight: float = 1.0,
) -> ResolvedDataset:
    """A resolved DreamBooth data set whose subsets all have the same rules."""
    subset = SubsetSpec(
        image_dir="images", augmentation=augmentation or Augmentation(), captions=captions or CaptionRules()
    )
    spec = DatasetSpec(
        DatasetKind.DREAMBOOTH, batch_size, None, (subset,) * subsets, prior_loss_weight=prior_loss_weight
    )
    return ResolvedDataset(spec, tuple(records), tuple(fits))


class AveragingVae(nn.Module):
    """Stands for AutoencoderKL: the mean is the picture averaged over 8 x 8 pixels, the deviation is constant.

    ``calls`` holds the shape and type of each encode. ``overflow_above``: in half precision a picture whose mean is
    above this gives NaN.
    """

    def __init__(self, deviation: float = 0.0, overflow_above: float | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)
        self.deviation = deviation
        self.overflow_above = overflow_above
        self.calls: list[tuple[tuple[int, ...], torch.dtype]] = []

    def encode(self, images_BCHW: torch.Tensor) -> SimpleNamespace:
        assert images_BCHW.dtype == self.gain.dtype
        self.calls.append((tuple(images_BCHW.shape), images_BCHW.dtype))
        mean = nn.functional.avg_pool2d(images_BCHW.float(), 8)
        mean = torch.cat([mean, mean.mean(1, keepdim=True)], dim=1) * self.gain.float()
        if self.overflow_above is not None and self.gain.dtype != torch.float32:
            mean[images_BCHW.float().mean((1, 2, 3)) > self.overflow_above] = float("nan")
        mean = mean.to(self.gain.dtype)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, self.deviation)))
