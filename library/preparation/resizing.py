"""Smaller copies of pictures. Each is made from the original, whatever the order of the sizes.

Pictures are RGB arrays HWC; sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from library.checkpoint.io import atomic_path
from library.data.formats import IMAGE_EXTENSIONS
from library.data.images import Pixels, UnreadableImage, read_image
from library.data.loader import prefetch
from library.data.records import Size
from library.log import UserError, progress
from library.options.preparation import ResizeImagesOptions
from library.preparation.files import find_images
from library.preparation.outcome import Outcome

_FILTERS = {"area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC, "lanczos4": cv2.INTER_LANCZOS4}
_WORKERS = 2


@dataclass(frozen=True, slots=True)
class Reduction:
    """What is done to a picture: scaled to ``scaled``, then its middle of ``cut`` is taken."""

    scaled: Size
    cut: Size


def reduction(size: Size, most: Size, divisible_by: int = 1) -> Reduction:
    """How a picture gets at most the area of ``most`` and sides that are multiples of ``divisible_by``.

    Both sides are scaled alike and rounded down; a picture that is small enough already is only cut. Raises
    ValueError if nothing would be left.
    """
    width, height = size
    if width * height > most[0] * most[1]:
        scale = math.sqrt(most[0] * most[1] / (width * height))
        width, height = int(width * scale), int(height * scale)
    cut = width // divisible_by * divisible_by, height // divisible_by * divisible_by
    if min(cut) < 1:
        raise ValueError(f"{size[0]}x{size[1]} pixels are too few for sides that are multiples of {divisible_by}")
    return Reduction((width, height), cut)


def reduced(pixels_HWC: Pixels, plan: Reduction, interpolation: str = "area") -> Pixels:
    """The picture after a `Reduction`."""
    if (pixels_HWC.shape[1], pixels_HWC.shape[0]) != plan.scaled:
        resized = cv2.resize(pixels_HWC, plan.scaled, interpolation=_FILTERS[interpolation])
        pixels_HWC = np.asarray(resized, np.uint8)
    left, top = ((whole - part) // 2 for whole, part in zip(plan.scaled, plan.cut, strict=True))
    return pixels_HWC[top : top + plan.cut[1], left : left + plan.cut[0]]


def resize_folder(options: ResizeImagesOptions) -> Outcome:
    """Write ``<stem>+<W>x<H>.jpg`` for each picture and size, W and H as in the option. Raises UserError.

    Of pictures that differ in their suffix only, the whole name takes the stem's place (``a.png+64x64.jpg``).
    Files that are no pictures are copied as they are; subfolders are passed over. With ``copy_associated_files`` what
    belongs to a picture (same stem) is copied once for each size instead.
    """
    source, target = (Path(str(name)).expanduser() for name in (options.src_img_folder, options.dst_img_folder))
    images = find_images(str(source))
    if source.resolve() == target.resolve():
        raise UserError(f"dst_img_folder {target}: must be another folder than src_img_folder")
    stems = Counter(image.stem for image in images)
    outcome, work = Outcome(), _Resizing(options, target, _companions(source, images), stems)
    target.mkdir(parents=True, exist_ok=True)
    for path, problem in progress(prefetch(images, work.resize, _WORKERS), "pictures", total=len(images)):
        if problem is None:
            outcome.done += 1
        else:
            outcome.fail(str(path), problem)
    for path in sorted(source.iterdir()):
        is_other = path.is_file() and path.suffix.lower() not in IMAGE_EXTENSIONS and not path.name.startswith(".")
        if is_other and not (options.copy_associated_files and path.stem in stems):
            _copy(path, target / path.name)
    return outcome


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target, durable=False) as temporary:
        shutil.copy(source, temporary)


def _companions(source: Path, images: list[Path]) -> dict[str, list[Path]]:
    """The files that are no pictures, by the stem of the picture that they belong to."""
    found: dict[str, list[Path]] = {image.stem: [] for image in images}
    for path in sorted(source.iterdir()):
        if path.stem in found and path.suffix.lower() not in IMAGE_EXTENSIONS and path.is_file():
            found[path.stem].append(path)
    return found


@dataclass(frozen=True)
class _Resizing:
    """The work on one picture, run in threads."""

    options: ResizeImagesOptions
    target: Path
    companions: dict[str, list[Path]]
    stems: Counter[str]

    def resize(self, path: Path) -> tuple[Path, str | None]:
        """Write all sizes of a picture; returns what kept it from being done, or None."""
        try:
            pixels_HWC = read_image(str(path))
            size = (pixels_HWC.shape[1], pixels_HWC.shape[0])
            plans = [reduction(size, most, self.options.divisible_by) for most in self.options.max_resolution]
        except UnreadableImage as error:
            return path, error.reason
        except ValueError as error:
            return path, str(error)
        for most, plan in zip(self.options.max_resolution, plans, strict=True):
            name = f"{self._name_of(path)}+{most[0]}x{most[1]}"
            picture = Image.fromarray(reduced(pixels_HWC, plan, self.options.interpolation))
            file = self.target / f"{name}{'.png' if self.options.save_as_png else '.jpg'}"
            with atomic_path(file, durable=False) as temporary:
                picture.save(temporary, quality=100, subsampling=0)
            for companion in self.companions[path.stem] if self.options.copy_associated_files else ():
                _copy(companion, self.target / f"{name}{companion.suffix}")
        return path, None

    def _name_of(self, path: Path) -> str:
        """What names the results of a picture: its stem, or the whole name where another picture has that stem."""
        return path.stem if self.stems[path.stem] == 1 else path.name
