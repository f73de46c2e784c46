"""Encode the images of a training ahead of time into .npz files beside them. Takes the options of train_network.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.log import UserError, setup_logging
from library.options import LogOptions
from library.options.script import parse
from library.options.scripts import CACHE_LATENTS


def main(argv: Sequence[str] | None = None) -> int:
    """Cache the latents of the data sets that the options describe; returns the exit status."""
    try:
        settings = parse(CACHE_LATENTS, argv)
        log = settings[LogOptions]
        setup_logging(log.console_log_level, log.console_log_file, log.console_log_simple)

        from library.training.caching import cache_ahead  # heavy: only once the options are known to be good

        cache_ahead(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was written is whole, and the next start goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
