"""Where prompt lines come from: the command line, a file, a module, the keyboard. One raw line at a time."""

from __future__ import annotations

import importlib.util
import io
import logging
import random
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from library.interrupt import stop_at_once
from library.log import UserError
from library.options.generation import PromptOptions

logger = logging.getLogger(__name__)
_OTHER_FORMS = (".toml", ".json")


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line as it was given, and where. ``source`` and ``mask``: files that belong to it, if it brings its own."""

    text: str
    where: str
    source: str | None = None
    mask: str | None = None


class LineSource(Protocol):
    """Gives the lines of one iteration after the other."""

    def lines(self, iteration: int) -> Iterator[RawLine]: ...


@dataclass(frozen=True)
class ListedLines:
    """Lines known from the start, shuffled anew in each iteration if asked for."""

    all: Sequence[RawLine]
    shuffle: Callable[[int], random.Random] | None = None

    def lines(self, iteration: int) -> Iterator[RawLine]:
        """The lines of an iteration."""
        chosen = list(self.all)
        if self.shuffle is not None:
            self.shuffle(iteration).shuffle(chosen)
        return iter(chosen)


class KeyboardLines:
    """Lines typed by the user until the end of input, or Ctrl-C instead of a line."""

    def lines(self, iteration: int) -> Iterator[RawLine]:
        """One line at a time, as they are typed; blank ones are asked for again."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # the line is refused then, and not the whole program
        number = 0
        while True:
            try:
                with stop_at_once():
                    text = input("prompt (end with Ctrl-D): " if sys.stdin.isatty() else "")
            except (EOFError, KeyboardInterrupt):
                return
            number += 1
            if text.strip():
                yield RawLine(text, f"line {number}")


@dataclass
class ModuleLines:
    """Lines from a Python file of the user's, whose name is for messages. ``call`` gives the line of an index."""

    name: str
    call: Callable[[int], Any]
    shuffle: Callable[[], None] | None = None

    def lines(self, iteration: int) -> Iterator[RawLine]:
        """Lines until the module gives None. Raises UserError for whatever goes wrong in it."""
        index = 0
        with _told(self.name):
            if self.shuffle is not None:
                self.shuffle()
        while True:
            with _told(self.name):
                text = self.call(index)
            if text is None:
                return
            if not isinstance(text, str):
                raise UserError(f"--from_module {self.name}: gave {text!r}; must be text, or None at the end")
            index += 1
            yield RawLine(text, f"prompt {index} of the module")


@contextmanager
def _told(name: str) -> Generator[None]:
    """Whatever the user's module does wrong becomes one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"--from_module {name}: {type(error).__name__}: {error}") from error


def read_prompt_file(name: str) -> list[RawLine]:
    """The prompts of a file; blank lines and lines that begin with # are left out. Raises UserError."""
    if Path(name).suffix.lower() in _OTHER_FORMS:
        raise UserError(
            f"--from_file {name}: must be plain text with one prompt in each line; {' and '.join(_OTHER_FORMS)} files "
            "of prompts are for --sample_prompts of the trainers"
        )
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from_file {name}: cannot be read as UTF-8 text ({error})") from error
    numbered = enumerate(text.split("\n"), 1)
    found = [RawLine(line.strip(), f"{name} line {number}") for number, line in numbered if line.strip()]
    found = [line for line in found if not line.text.startswith("#")]
    if not found:
        raise UserError(f"--from_file {name}: there is no prompt in it")
    return found


def prompts_of_pictures(paths: Sequence[str], masks: Sequence[str] = ()) -> list[RawLine]:
    """The prompts that stand in pictures, each with its picture and the mask of the same place in the list.

    Pictures without a prompt are left out, with their masks. Raises UserError if none has one.
    """
    from PIL import Image as PilImage
    from PIL import UnidentifiedImageError

    found: list[RawLine] = []
    for index, path in enumerate(paths):
        try:
            with PilImage.open(path) as image:
                prompt, negative = image.info.get("prompt"), image.info.get("negative-prompt")
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"--image_path {path}: cannot be read as a picture ({error})") from error
        if not prompt:
            logger.warning("%s: there is no prompt in it; it is left out", path)
            continue
        text = f"{prompt} --n {negative}" if negative else str(prompt)
        found.append(RawLine(text, path, path, masks[index % len(masks)] if masks else None))
    if not found:
        raise UserError("--image_path: there is no prompt in the pictures; give one with --prompt or --from_file")
    return found


def load_prompt_module(options: PromptOptions, args: Any, engine: Any, networks: Sequence[Any]) -> Any:
    """The prompter of ``--from_module``: what its ``get_prompter(args, pipe, networks)`` gives. Raises UserError."""
    name = str(options.from_module)
    spec = importlib.util.spec_from_file_location("prompt_module", name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise UserError(f"--from_module {name}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    with _told(name):
        spec.loader.exec_module(module)
        prompter = module.get_prompter(args, engine, list(networks))
        if options.shuffle_prompts:
            _ = prompter.shuffle
        return prompter
