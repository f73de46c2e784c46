"""What is checked before any slow work: places to write to, files to read, space on the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from library.log import UserError
from library.options import NetworkOptions, SampleOptions, SaveOptions
from library.options.settings import Settings


def check_places(settings: Settings) -> None:
    """Raise one UserError with everything that would stop the run later."""
    problems = [*_output_problems(settings[SaveOptions].output_dir), *_file_problems(settings)]
    if problems:
        raise UserError.of(problems)


def _output_problems(output_dir: str | None) -> list[str]:
    if not output_dir:
        return ["--output_dir is missing: say where the trained model goes"]
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
    except OSError as error:
        return [f"--output_dir {output_dir}: cannot write there ({error.strerror or error}); choose another folder"]
    return []


def _file_problems(settings: Settings) -> list[str]:
    named: list[tuple[str, str | None]] = []
    if NetworkOptions in settings:
        network = settings[NetworkOptions]
        named.append(("network_weights", network.network_weights))
        named += [("base_weights", file) for file in network.base_weights or []]
    named.append(("sample_prompts", settings[SampleOptions].sample_prompts))
    return [f"--{name} {file}: there is no such file" for name, file in named if file and not os.path.isfile(file)]


def free_bytes(output_dir: str) -> int:
    """Free space where the output goes; the folder itself need not exist yet."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
