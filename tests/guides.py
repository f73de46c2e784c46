"""The commands that the documents show, and running them as a reader would: in the order of the document, in one
folder, from the script's own last line on, but in this process.
"""

from __future__ import annotations

import argparse
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from library.options.parser import read_command_line
from library.options.scripts import SCRIPTS
from tests.house.source_map import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "tiny" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS = ("python ", "accelerate ", "torchrun ", ".venv/", "pip ")
SPAN = re.compile(r"`([^`]+)`")


def relative(path: Path) -> str:
    """A document's name as the tables of tests have it."""
    return path.relative_to(ROOT).as_posix()


def commands_of(document: Path) -> list[str]:
    """The command lines of blocks without a language."""
    blocks = [body for language, body in FENCE.findall(document.read_text("utf-8")) if language in ("", "bash", "sh")]
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith(STARTS)]


def inline_commands(document: Path) -> list[str]:
    """The command lines within sentences and tables, once each: an interpreter or options stand beside a script.

    A script's name alone is a name.
    """
    spans = (" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", document.read_text("utf-8"))))
    return [*dict.fromkeys(span for span in spans if re.search(r"(^| )[\w/]+\.py( |$)", span) and " " in span)]


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


class _Parsed(Exception):
    """A command line was understood, and the program stopped there."""


def assert_accepted(command: str) -> None:
    """The script of a command line knows its options. What else a run needs may be missing, and ``...`` is skipped."""
    script, options = script_and_options(command)
    row = {row.name: row for row in SCRIPTS}.get(script)
    if row:
        _, unknown, problems = read_command_line(row, [word for word in options if word != "..."])
        assert not unknown, f"{command}: {script} has no --{', --'.join(name for name, _ in unknown)}"
        assert not problems, f"{command}: {problems}"
        return
    assert (ROOT / script).is_file(), f"{command}: there is no {script}"
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
        parse_args(parser, argv)
        raise _Parsed

    stopped = False
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        try:
            run_script(script, options)
        except _Parsed:
            stopped = True
    assert stopped, f"{command} is not accepted"


def run_here(command: list[str]) -> str:
    """Run ``python script.py ...`` or ``python -c text`` in this process instead of its own; what it printed."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        status = 0
        if command[1] == "-c":
            exec(command[2], {})
        else:
            status = run_script(command[1], command[2:])
    assert status == 0, f"{command} ended with {status}: {printed.getvalue()}"
    return printed.getvalue()


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
