"""Convert a network file between the names of this program, of Diffusers and PEFT, and of SDXL's two namings of blocks.

``python networks/convert_lora.py --model a.safetensors --to diffusers --save_to b.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import ConvertOptions
from library.options.scripts import CONVERT_LORA
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the file that the options name; returns the exit status."""
    return run_command(CONVERT_LORA, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.convert import convert_file

    convert_file(settings[ConvertOptions])
    return 0


if __name__ == "__main__":
    sys.exit(main())
