"""Encode the images of a training ahead of time into .npz files beside them. Takes the options of train_network.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.scripts import CACHE_LATENTS
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Cache the latents of the data sets that the options describe; returns the exit status."""
    return run_command(CACHE_LATENTS, _work, argv)


def _work(settings: Settings) -> int:
    from library.training.ahead import cache_latents_ahead

    cache_latents_ahead(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
