"""Picture files for measurements: random colours, smooth, so that a JPEG file of them has a photo's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> list[Path]:
    """``count`` JPEG files of ``size`` (width, height) in a folder that is made."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    paths: list[Path] = []
    for index in range(count):
        coarse_HWC = random.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse_HWC).resize(size, Image.Resampling.BICUBIC)
        paths.append(folder / f"photo{index}.jpg")
        picture.save(paths[-1], quality=90)
    return paths
