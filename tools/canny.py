"""Draw the edges of a picture, white on black: guide pictures for ControlNets.

``python tools/canny.py --input photo.jpg --output edges.png``
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
    parser.add_argument("--input", required=True, metavar="FILE", help="picture to read")
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write")
    parser.add_argument("--thres1", type=float, default=LOW, metavar="N", help=f"lower threshold ({LOW})")
    parser.add_argument("--thres2", type=float, default=HIGH, metavar="N", help=f"upper threshold ({HIGH})")
    options = parser.parse_args(argv)
    try:
        write_edges(options.input, options.output, options.thres1, options.thres2)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


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
