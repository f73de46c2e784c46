"""Make a LoRA of what distinguishes a tuned model from the original one.

``python networks/extract_lora_from_models.py --model_org a.ckpt --model_tuned b.ckpt --save_to lora.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import ExtractOptions
from library.options.scripts import EXTRACT_LORA_FROM_MODELS
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the models and write the network; returns the exit status."""
    return run_command(EXTRACT_LORA_FROM_MODELS, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.extract import extract_file

    extract_file(settings[ExtractOptions])
    return 0


if __name__ == "__main__":
    sys.exit(main())
