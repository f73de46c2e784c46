"""Show what is in a network file: ``python networks/check_lora_weights.py lora.safetensors``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import CheckOptions
from library.options.scripts import CHECK_LORA_WEIGHTS
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Print and report; the exit status is 1 for a file with values that are not finite."""
    return run_command(CHECK_LORA_WEIGHTS, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.check import check_command

    return 1 if check_command(settings[CheckOptions]).not_finite else 0


if __name__ == "__main__":
    sys.exit(main())
