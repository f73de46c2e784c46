"""Merge networks (LoRA and others) into an SDXL model, or networks for SDXL with each other.

``python networks/sdxl_merge_lora.py --sd_model model.safetensors --models a.safetensors --save_to out.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import MergeFilesOptions, MergeOptions
from library.options.scripts import SDXL_MERGE_LORA
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Merge what the options name; returns the exit status."""
    return run_command(SDXL_MERGE_LORA, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.merge import merge

    merge(settings[MergeFilesOptions], settings[MergeOptions], ("sdxl",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
