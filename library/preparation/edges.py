"""Edges of picture files, one or a folder of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from PIL import Image

from library.checkpoint.io import atomic_path
from library.data.images import UnreadableImage, read_image
from library.generation.preprocess import canny
from library.log import UserError, progress
from library.options.preparation import CannyOptions
from library.preparation.files import find_images
from library.preparation.outcome import Outcome


def draw_edges(options: CannyOptions) -> Outcome:
    """Write the edges of a picture, or of each picture of a folder, as PNG of the same name. Raises UserError."""
    source, target = Path(str(options.input)).expanduser(), Path(str(options.output)).expanduser()
    outcome = Outcome()
    if not source.is_dir():
        try:
            _draw(source, target, options)
        except UnreadableImage as error:
            raise UserError(f"--input {error}") from error
        outcome.done = 1
        return outcome
    if target.is_file() or target.resolve() == source.resolve():
        raise UserError(f"--output {target}: must be another folder, because --input is one")
    images = find_images(str(source))
    stems = Counter(image.stem for image in images)
    for image in progress(images, "pictures"):
        name = f"{image.stem}.png" if stems[image.stem] == 1 else f"{image.name}.png"
        try:
            _draw(image, target / name, options)
            outcome.done += 1
        except UnreadableImage as error:
            outcome.fail(error.path, error.reason)
    return outcome


def _draw(source: Path, target: Path, options: CannyOptions) -> None:
    edges = Image.fromarray(canny(read_image(str(source)), options.thres1, options.thres2))
    if target.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--output {target}: the name must end in .png, .jpg or another kind of picture")
    with atomic_path(target) as temporary:
        edges.save(temporary)
