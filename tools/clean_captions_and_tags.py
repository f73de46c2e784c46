"""Clean the captions and tags of a metadata file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import CleanOptions
from library.options.preparation_scripts import CLEAN_METADATA
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(CLEAN_METADATA, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.cleaning_run import clean_metadata

    return clean_metadata(settings[CleanOptions]).report("images cleaned")


if __name__ == "__main__":
    sys.exit(main())
