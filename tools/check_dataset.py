"""Report what is wrong with a data set, in words and as a page, and move the bad images aside if asked to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.scripts import CHECK_DATASET
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Check what the options name; returns the exit status."""
    return run_command(CHECK_DATASET, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.check_run import check_dataset

    check_dataset(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
