"""Give the images of a metadata file their training sizes, and encode them into .npz files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import PrepareOptions
from library.options.preparation_scripts import PREPARE_LATENTS
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(PREPARE_LATENTS, _work, argv)


def _work(settings: Settings) -> int:
    from library.training.metadata_latents import prepare_latents

    return prepare_latents(settings[PrepareOptions]).report("images prepared")


if __name__ == "__main__":
    sys.exit(main())
