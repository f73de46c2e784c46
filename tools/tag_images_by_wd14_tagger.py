"""Write a tag file beside each image of a folder, by a WD14 tagger."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import TagOptions
from library.options.preparation_scripts import TAG_IMAGES
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(TAG_IMAGES, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.tagging_run import tag_folder

    return tag_folder(settings[TagOptions]).report("tag files written")


if __name__ == "__main__":
    sys.exit(main())
