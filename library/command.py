"""From a command line to an exit status: options first, heavy imports only once they are known to be good."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from library.log import UserError, first_line, is_out_of_memory, process_index, setup_logging
from library.options import ConsoleOptions
from library.options.script import parse
from library.options.settings import ScriptOptions, Settings

logger = logging.getLogger(__name__)
INTERRUPTED = 130  # the shell's status for a program ended by Ctrl-C


def run_command(
    options: ScriptOptions,
    work: Callable[[Settings], int],
    argv: Sequence[str] | None = None,
    out_of_memory: str = "out of memory",
) -> int:
    """Parse, log, work; returns the exit status. ``argv`` None takes the program's own command line.

    ``work`` imports what is heavy by itself. Errors of the user become plain lines, with a traceback only under
    ``--console_log_level DEBUG``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the output cannot show ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        settings = parse(options, argv)
        log = settings[ConsoleOptions]
        setup_logging(log.console_log_level, log.console_log_file, log.console_log_simple)
        for line in settings.warnings:
            logger.warning("%s", line)
        return work(settings)
    except UserError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"{out_of_memory} ({first_line(error)})")
    except BrokenPipeError:  # the reader of our output has enough (head): Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped at once; files under final names are whole", file=sys.stderr)
        return INTERRUPTED


def _fail(message: str) -> int:
    if logging.getLogger("library").isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    rank = process_index()
    print(f"error{f' in process {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    return 1
