"""Encode the captions of an SDXL training ahead of time into _te_outputs.npz files beside the images.

Takes the options of sdxl_train_network.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import UserError, setup_logging
from library.options import LogOptions
from library.options.script import parse
from library.options.scripts import CACHE_TEXT


def main(argv: Sequence[str] | None = None) -> int:
    """Cache what the text encoders make of the data sets' captions; returns the exit status."""
    try:
        settings = parse(CACHE_TEXT, argv)
        log = settings[LogOptions]
        setup_logging(log.console_log_level, log.console_log_file, log.console_log_simple)

        from library.training.text_caching import cache_text_ahead  # heavy: only once the options are known to be good

        cache_text_ahead(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was written is whole, and the next start goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
