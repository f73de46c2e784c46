"""Score how well a model draws scenes of coloured shapes: gen_img draws, plain image analysis reads the pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.scenes import SCORE_TINY, ScoreOptions
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(SCORE_TINY, _work, argv)


def _work(settings: Settings) -> int:
    from library.generation.scoring import print_scores

    return print_scores(settings[ScoreOptions])


if __name__ == "__main__":
    sys.exit(main())
