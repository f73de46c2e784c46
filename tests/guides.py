"""The commands that the documents show, and running them as a reader would: in the order of the document, in one
folder, from the script's own last line on, but in this process.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from tests.house.source_map import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "tiny" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS = ("python ", "accelerate ", "torchrun ", ".venv/", "pip ")


def relative(path: Path) -> str:
    """A document's name as the tables of tests have it."""
    return path.relative_to(ROOT).as_posix()


def commands_of(document: Path) -> list[str]:
    """The command lines of blocks without a language."""
    blocks = [body for language, body in FENCE.findall(document.read_text("utf-8")) if language in ("", "bash", "sh")]
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith(STARTS)]


def script_and_options(command: str) -> tuple[str, list[str]]:
    """The project's script in a command line, and what stands behind it; no script is ("", [])."""
    words = shlex.split(command, comments=True)
    at = next((index for index, word in enumerate(words) if word.endswith(".py")), len(words))
    return ("".join(words[at : at + 1]), words[at + 1 :])


def run_script(script: str, argv: Iterable[str]) -> int:
    """What ``python script argv`` does and its exit status, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = [str(ROOT / script), *argv]
    with mock.patch.object(sys, "argv", words), mock.patch.object(sys, "path", [*sys.path]):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def run_command(command: str, more: str = "") -> int:
    """Run a command line of a document with ``more`` words behind it, which win; its exit status."""
    script, options = script_and_options(command)
    return run_script(script, [*options, *shlex.split(more)])


@dataclass(frozen=True)
class Row:
    """What is known of a command of a document, beside what the document says.

    ``end`` is how its line ends, as no other of the document does. ``makes`` are patterns of files of which it writes
    at least one each; ``says`` is what it prints. ``more`` are words that make it small. ``before`` and ``after`` get
    the reader's folder.
    """

    end: str
    makes: tuple[str, ...] = ()
    says: str = ""
    more: str = ""
    before: Callable[[Path], None] | None = None
    after: Callable[[Path], None] | None = None


def rows_of(command: str, rows: Iterable[Row]) -> list[Row]:
    """The rows that speak of a command: exactly one, if a table is complete."""
    return [row for row in rows if command.endswith(row.end)]


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def _assert_whole(path: Path) -> None:
    """A picture can be read, a model file has tensors, and nothing is empty."""
    assert path.stat().st_size, f"{path} is empty"
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".safetensors":
        with safe_open(str(path), "pt") as file:
            assert list(file.keys()), f"{path} has no tensors"


def check_command(command: str, row: Row, folder: Path, said: Callable[[], str]) -> None:
    """Run a command in ``folder``, the working folder, and see that it keeps what the row promises.

    ``said`` gives and forgets what was printed. A dry run must leave all files as they are.
    """
    assert row.makes or row.says or row.after, f"{row.end}: nothing is promised"
    if row.before:
        row.before(folder)
    earlier = _stamps(folder)
    said()
    status = run_command(command, row.more)
    text = said()
    assert status == 0, f"{command}\n{text}"
    changed = [path for path, stamp in _stamps(folder).items() if earlier.get(path) != stamp]
    if "--dry_run" in command:
        assert not changed, f"{command}: a dry run wrote {changed}"
    for pattern in row.makes:
        made = [path for path in changed if path.relative_to(folder).match(pattern)]
        assert made, f"{command}: no new {pattern}, but {sorted(map(str, changed))}"
        for path in made:
            _assert_whole(path)
    assert row.says in text, f"{command} did not say {row.says!r}:\n{text}"
    if row.after:
        row.after(folder)
