"""Cut a DyLoRA into networks of fixed ranks.

``python networks/extract_lora_from_dylora.py --model dylora.safetensors --unit 4 --save_to split.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import DyloraSplitOptions
from library.options.scripts import EXTRACT_LORA_FROM_DYLORA
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files of all ranks; returns the exit status."""
    return run_command(EXTRACT_LORA_FROM_DYLORA, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.split import split_file

    split_file(settings[DyloraSplitOptions])
    return 0


if __name__ == "__main__":
    sys.exit(main())
