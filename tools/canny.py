"""Draw the edges of a picture, white on black: guide pictures for ControlNets.

``python tools/canny.py --input photo.jpg --output edges.png``, or a folder of pictures and a folder for their edges.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import UserError

LOW, HIGH = 32, 224


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the edges of a picture, white on black.")
    parser.add_argument("--input", required=True, metavar="PATH", help="picture to read, or folder of pictures")
    parser.add_argument("--output", required=True, metavar="PATH", help="picture to write, or folder for them")
    parser.add_argument("--thres1", type=float, default=LOW, metavar="N", help=f"lower threshold ({LOW})")
    parser.add_argument("--thres2", type=float, default=HIGH, metavar="N", help=f"upper threshold ({HIGH})")
    options = parser.parse_args(argv)
    try:
        work = write_folder if Path(options.input).is_dir() else write_edges
        work(options.input, options.output, options.thres1, options.thres2)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_folder(source: str, target: str, low: float = LOW, high: float = HIGH) -> None:
    """Write the edges of each picture of a folder as a PNG of its name. Raises UserError as `write_edges` does."""
    from library.data.index import IMAGE_EXTENSIONS
    from library.log import progress

    folder = Path(target)
    pictures = [path for path in sorted(Path(source).iterdir()) if path.suffix.lower() in IMAGE_EXTENSIONS]
    if not pictures:
        raise UserError(f"--input {source}: there are no pictures in the folder")
    if folder.resolve() == Path(source).resolve():
        raise UserError(f"--output {target}: is the folder of the pictures themselves")
    for path in progress(pictures, "edges"):
        write_edges(str(path), str(folder / f"{path.stem}.png"), low, high)


def write_edges(source: str, target: str, low: float = LOW, high: float = HIGH) -> None:
    """Read a picture, write its edges. Raises UserError for what cannot be read or written."""
    from PIL import Image

    from library.checkpoint.io import atomic_path
    from library.data.images import UnreadableImage, read_image
    from library.generation.preprocess import canny

    try:
        edges = Image.fromarray(canny(read_image(source), low, high))
    except UnreadableImage as error:
        raise UserError(f"--input {error}") from error
    if Path(target).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--output {target}: the name must end in .png, .jpg or another kind of picture")
    with atomic_path(target) as temporary:
        edges.save(temporary)


if __name__ == "__main__":
    sys.exit(main())
