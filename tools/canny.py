"""Draw the edges of pictures, white on black: guide pictures for ControlNets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import CannyOptions
from library.options.preparation_scripts import CANNY
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(CANNY, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.edges import draw_edges

    return draw_edges(settings[CannyOptions]).report("pictures drawn")


if __name__ == "__main__":
    sys.exit(main())
