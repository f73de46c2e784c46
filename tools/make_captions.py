"""Write a caption file beside each image of a folder, by BLIP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import BlipCaptionOptions
from library.options.preparation_scripts import MAKE_CAPTIONS
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(MAKE_CAPTIONS, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.blip import caption_folder

    return caption_folder(settings[BlipCaptionOptions]).report("captions written")


if __name__ == "__main__":
    sys.exit(main())
