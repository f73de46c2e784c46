"""The command line of a training script. Light to import, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Sequence

from library.command import run_command
from library.options.settings import Settings
from library.training.script import Script

_OUT_OF_MEMORY = "out of memory: use a smaller batch or resolution, --gradient_checkpointing or --mixed_precision"


def run(script: Script, argv: Sequence[str] | None = None) -> int:
    """Run a training script; returns its exit status. ``argv`` None takes the program's own command line."""

    def work(settings: Settings) -> int:
        from library.training.session import run_session

        return run_session(script, settings)

    return run_command(script.options, work, argv, _OUT_OF_MEMORY)
