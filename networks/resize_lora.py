"""Change the rank of a network file.

``python networks/resize_lora.py --model a.safetensors --new_rank 8 --save_to b.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import ResizeOptions
from library.options.scripts import RESIZE_LORA
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Resize the network that the options name; returns the exit status."""
    return run_command(RESIZE_LORA, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.resize import resize_file

    resize_file(settings[ResizeOptions])
    return 0


if __name__ == "__main__":
    sys.exit(main())
