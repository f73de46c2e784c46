"""Gather the caption files of a folder into a metadata file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import MergeTextOptions
from library.options.preparation_scripts import MERGE_CAPTIONS
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(MERGE_CAPTIONS, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.merging import merge_texts

    return merge_texts(settings[MergeTextOptions], "caption").report("captions merged")


if __name__ == "__main__":
    sys.exit(main())
