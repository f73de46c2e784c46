"""Makes ``examples/photos`` from the sample images of scikit-image: small crops with captions beside them.

The pictures are free of copyright (THIRD_PARTY_NOTICES.md names the sources). Only the files are needed, not the
package: ``pip download --no-deps scikit-image``, unpack the wheel, and give its folder ``skimage/data``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.checkpoint.io import atomic_path, atomic_write_text

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the source


@dataclass(frozen=True)
class Crop:
    """One example picture: a box of a source image, saved as ``folder/name.jpg`` with its caption."""

    folder: str
    name: str
    source: str
    box: Box | None
    caption: str


CAT = "cat/4_sks cat"
CUP = "cup/4_sks cup"
SUBJECTS = "subjects/1_photo"

CROPS = (
    Crop(CAT, "whole", "chelsea.png", None, "a photo of sks cat, looking to the right"),
    Crop(CAT, "face", "chelsea.png", (75, 0, 375, 300), "a photo of sks cat, face, green eyes"),
    Crop(CAT, "left", "chelsea.png", (30, 0, 330, 300), "a photo of sks cat, green eyes"),
    Crop(CAT, "right", "chelsea.png", (105, 0, 405, 300), "a photo of sks cat, blurred background"),
    Crop(CAT, "close", "chelsea.png", (105, 35, 365, 295), "a close photo of sks cat, whiskers"),
    Crop(CAT, "tall", "chelsea.png", (130, 0, 355, 300), "a photo of sks cat, face"),
    Crop(CAT, "wide", "chelsea.png", (20, 0, 420, 300), "a photo of sks cat, green eyes, whiskers"),
    Crop(CAT, "nose", "chelsea.png", (90, 20, 350, 280), "a photo of sks cat, looking to the right, whiskers"),
    Crop(CUP, "whole", "coffee.png", None, "a photo of sks cup on a wooden table"),
    Crop(CUP, "square", "coffee.png", (85, 0, 485, 400), "a photo of sks cup, red saucer, spoon"),
    Crop(CUP, "close", "coffee.png", (110, 5, 440, 335), "a close photo of sks cup, coffee"),
    Crop(CUP, "tall", "coffee.png", (130, 0, 430, 400), "a photo of sks cup, red saucer"),
    Crop(SUBJECTS, "astronaut", "astronaut.png", (56, 0, 456, 400), "a photo of an astronaut"),
    Crop(SUBJECTS, "rocket", "rocket.jpg", (107, 0, 534, 427), "a photo of a rocket"),
    Crop(SUBJECTS, "galaxies", "hubble_deep_field.jpg", (240, 60, 640, 460), "a photo of galaxies"),
    Crop(SUBJECTS, "photographer", "camera.png", (0, 20, 440, 460), "a photo of a photographer"),
    Crop(SUBJECTS, "bricks", "brick.png", (0, 0, 256, 256), "a photo of bricks"),
    Crop(SUBJECTS, "grass", "grass.png", (0, 0, 256, 256), "a photo of grass"),
    Crop(SUBJECTS, "gravel", "gravel.png", (0, 0, 256, 256), "a photo of gravel"),
)


def write_crops(source_dir: Path, target_dir: Path, longest_side: int = 320, quality: int = 85) -> None:
    """Write every picture (JPEG, at most ``longest_side`` pixels) and its caption below ``target_dir``."""
    for crop in CROPS:
        folder = target_dir / crop.folder
        with Image.open(source_dir / crop.source) as source:
            picture = source.convert("RGB").crop(crop.box)
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
        with atomic_path(folder / f"{crop.name}.jpg") as part:
            picture.save(part, quality=quality, optimize=True)
        atomic_write_text(folder / f"{crop.name}.txt", crop.caption + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make examples/photos from the images of scikit-image.")
    parser.add_argument("source_dir", type=Path, help="folder skimage/data of an unpacked scikit-image wheel")
    parser.add_argument("--target_dir", type=Path, default=Path("examples/photos"), help="folder to write to")
    options = parser.parse_args()
    missing = sorted({crop.source for crop in CROPS if not (options.source_dir / crop.source).is_file()})
    if missing:
        parser.error(f"source_dir {options.source_dir} has no {', '.join(missing)}; give the wheel's skimage/data")
    write_crops(options.source_dir, options.target_dir)


if __name__ == "__main__":
    main()
