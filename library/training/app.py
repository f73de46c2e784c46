"""From a command line to an exit status: options first, heavy imports only once they are known to be good."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence

from library.log import UserError, process_index, setup_logging
from library.options import LogOptions
from library.options.script import parse
from library.options.settings import Settings
from library.training.script import Script

logger = logging.getLogger(__name__)
INTERRUPTED = 130  # the shell's status for a program ended by Ctrl-C


def run(script: Script, argv: Sequence[str] | None = None) -> int:
    """Run a training script; returns its exit status. ``argv`` None takes the program's own command line."""
    try:
        settings = parse(script.options, argv)
        options = settings[LogOptions]
        setup_logging(options.console_log_level, options.console_log_file, options.console_log_simple)
        for line in settings.warnings:
            logger.warning("%s", line)
        return _run_session(script, settings)
    except UserError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("out of memory: use a smaller batch or resolution, --gradient_checkpointing or --mixed_precision")
    except KeyboardInterrupt:
        print("stopped at once; files under final names are whole", file=sys.stderr)
        return INTERRUPTED


def _run_session(script: Script, settings: Settings) -> int:
    from library.training.session import run_session

    return run_session(script, settings)


def _fail(message: str) -> int:
    """Say what is wrong in plain lines; the traceback only with ``--console_log_level DEBUG``."""
    if logging.getLogger("library").isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    rank = process_index()
    print(f"error{f' in process {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    return 1
