"""Merge networks (LoRA and others) with each other into a LoRA of a chosen rank.

``python networks/svd_merge_lora.py --models a.safetensors b.safetensors --new_rank 16 --save_to c.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import MergeFilesOptions, SvdMergeOptions
from library.options.scripts import SVD_MERGE_LORA
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Merge what the options name; returns the exit status."""
    return run_command(SVD_MERGE_LORA, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.merge import svd_merge

    svd_merge(settings[MergeFilesOptions], settings[SvdMergeOptions])
    return 0


if __name__ == "__main__":
    sys.exit(main())
