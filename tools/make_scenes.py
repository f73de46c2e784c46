"""Draw scenes of coloured shapes with captions: the data of the built-in model, or pictures of a new shape."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.scenes import MAKE_SCENES, SceneOptions
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(MAKE_SCENES, _work, argv)


def _work(settings: Settings) -> int:
    from library.scenes.files import write_scenes

    return write_scenes(settings[SceneOptions])


if __name__ == "__main__":
    sys.exit(main())
