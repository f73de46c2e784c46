"""The command line of image generation. Light to import, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Sequence

from library.command import run_command
from library.options.generation import PromptOptions
from library.options.settings import ScriptOptions, Settings

_OUT_OF_MEMORY = "out of memory: use a smaller size or batch, --bf16 or --fp16, or --vae_tiling"


def run(script: ScriptOptions, argv: Sequence[str] | None = None) -> int:
    """Run the generator; returns its exit status. ``argv`` None takes the program's own command line."""
    return run_command(script, _work, argv, _OUT_OF_MEMORY)


def _work(settings: Settings) -> int:
    if settings[PromptOptions].from_image:
        from library.generation.repeat import repeat_pictures

        return repeat_pictures(settings)
    from library.generation.session import run_session

    return run_session(settings)
