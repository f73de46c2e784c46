"""Encode the captions of an SDXL training ahead of time into _te_outputs.npz files beside the images.

Takes the options of sdxl_train_network.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.scripts import CACHE_TEXT
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Cache what the text encoders make of the data sets' captions; returns the exit status."""
    return run_command(CACHE_TEXT, _work, argv)


def _work(settings: Settings) -> int:
    from library.training.ahead import cache_text_ahead

    cache_text_ahead(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
