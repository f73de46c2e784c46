"""Cut and turn pictures by the faces in them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.preparation import FaceOptions
from library.options.preparation_scripts import DETECT_FACES
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(DETECT_FACES, _work, argv)


def _work(settings: Settings) -> int:
    from library.preparation.faces_run import cut_faces

    return cut_faces(settings[FaceOptions]).report("pictures searched")


if __name__ == "__main__":
    sys.exit(main())
