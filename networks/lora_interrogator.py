"""Show which tokens a network's text encoder part changes most.

``python networks/lora_interrogator.py --sd_model model.safetensors --model lora.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.network_tools import InterrogatorOptions
from library.options.scripts import LORA_INTERROGATOR
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Print the first hundred tokens; returns the exit status."""
    return run_command(LORA_INTERROGATOR, _work, argv)


def _work(settings: Settings) -> int:
    from networks.editing.interrogate import interrogate

    interrogate(settings[InterrogatorOptions])
    return 0


if __name__ == "__main__":
    sys.exit(main())
