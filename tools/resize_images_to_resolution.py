"""Write smaller copies of the pictures of a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import ResizeImagesOptions
from library.options.preparation_scripts import RESIZE_IMAGES
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(RESIZE_IMAGES, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.resizing import resize_folder

    return resize_folder(settings[ResizeImagesOptions]).report("pictures resized")


if __name__ == "__main__":
    sys.exit(main())
