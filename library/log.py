"""What the program says: one-line errors for users and their words, log records and progress.

Every module logs through ``logging.getLogger(__name__)``; only `setup_logging` installs handlers. Nothing heavy is
imported here, rich only when a terminal is there to draw on.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
OWN_LOGGERS = ("library", "networks", "tools", "__main__")
# Of these only errors show. The first warns of kernels that nothing here needs; the second gives two lines for each
# retry of each file, where what failed in the end is said once, by our own error.
OTHER_LOGGERS = ("bitsandbytes", "huggingface_hub.utils._http")
NAMES_SHOWN = 5
WINDOW = 50  # marks that the speed is measured over: the slow first steps drop out soon
PLAIN_SECONDS = 10.0  # pause between two plain progress lines

logger = logging.getLogger(__name__)


class UserError(Exception):
    """Something the user can mend. The text is one line a problem: what, where (option, file, line), what to do."""

    @classmethod
    def of(cls, problems: Iterable[str]) -> UserError:
        """One error that lists all problems, each on its own line."""
        return cls("\n".join(problems))


def first_line(error: BaseException) -> str:
    """What an error of another library says, fit for a message of one line: its first line with text, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's own error and for those of PyTorch's devices, which are RuntimeErrors told by their text."""
    text = str(error)
    signs = ("out of memory", "DefaultCPUAllocator")  # the second: the processor's, in whose text the words vary
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in signs))


def some_of(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at the most similar name, whatever its case: `` (did you mean x?)``, or nothing."""
    known = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1, cutoff=0.7)
    return f" (did you mean {known[found[0]]}?)" if found else ""


def process_index() -> int:
    """This process's number among all of the run, as the launcher's environment tells it (0 without a launcher)."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


class _PlainFormatter(logging.Formatter):
    """The bare message; from WARNING on with the level's name; with the process's number in all but the main one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname}: {text}"
        return f"[process {process_index()}] {text}" if process_index() else text


class _OwnFileHandler(logging.FileHandler):
    """Marks the handler as ours."""


class _OwnStreamHandler(logging.StreamHandler):  # pyright: ignore[reportMissingTypeArgument]
    """Marks the handler as ours."""


@functools.cache
def _terminal_handler_type() -> type[logging.Handler]:
    """The rich handler's type, imported on first use."""
    from rich.logging import RichHandler

    class OwnTerminalHandler(RichHandler):
        """Marks the handler as ours."""

    return OwnTerminalHandler


@functools.cache
def _terminal() -> Console:
    """The console that log records and progress bars share, so that a record does not tear a bar."""
    from rich.console import Console

    return Console(stderr=True)


def is_own_handler(handler: logging.Handler) -> bool:
    """True for what `setup_logging` installs."""
    return isinstance(handler, _OwnFileHandler | _OwnStreamHandler) or _is_terminal(handler)


def _is_terminal(handler: logging.Handler) -> bool:
    return "rich" in sys.modules and isinstance(handler, _terminal_handler_type())


def _file_handler(file: str) -> logging.Handler:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _OwnFileHandler) and Path(handler.baseFilename) == Path(file).absolute():
            return handler  # already ours and open: opening again would empty it
    try:
        return _OwnFileHandler(file, mode="w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--console_log_file {file}: cannot be written ({reason}); choose another file") from error


def _new_handler(file: str | None, simple: bool) -> logging.Handler:
    if file:
        return _file_handler(file) if process_index() == 0 else logging.NullHandler()
    if simple or not sys.stderr.isatty():
        return _OwnStreamHandler(sys.stdout if simple else sys.stderr)
    try:
        return _terminal_handler_type()(console=_terminal(), show_path=False)  # pyright: ignore[reportCallIssue]
    except ImportError:
        return _OwnStreamHandler(sys.stderr)


def setup_logging(level: str | None = None, file: str | None = None, simple: bool = False) -> None:
    """Install the one handler of this process; a second call replaces the first, so no record shows twice.

    ``level``: lowest severity shown of our own records (INFO if None); other packages show from WARNING on.
    ``file``: records go there instead of the terminal; it is emptied first, and only the main process writes it.
    ``simple``: bare lines on stdout. Otherwise rich on a terminal, bare lines on stderr elsewhere.
    Processes other than the main one show from WARNING on. Raises UserError if the file cannot be written.
    """
    handler = _new_handler(file, simple)
    if not _is_terminal(handler):
        handler.setFormatter(_PlainFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if is_own_handler(old)]:
        root.removeHandler(old)
        if old is not handler:
            old.close()
    root.addHandler(handler)
    lowest = getattr(logging, level or "INFO")
    root.setLevel(logging.WARNING)
    for name in OTHER_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(lowest if process_index() == 0 else max(lowest, logging.WARNING))


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds as ``1:02:03`` or ``2:03``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress(Generic[T]):
    """How far a piece of work is: a bar on a terminal, plain lines elsewhere, nothing in processes but the main one.

    Use it as a context manager with `advance`, or iterate over it. Time left and images/s come from the last marks.
    Nothing is shown of work that takes less than ``quiet_seconds``.
    """

    def __init__(
        self,
        work: Iterable[T] | int | None,
        description: str,
        *,
        total: int | None = None,
        seconds: float = PLAIN_SECONDS,
        quiet_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items: Iterable[T] | None = None if work is None or isinstance(work, int) else work
        size = getattr(work, "__len__", None)
        self.total = total if total is not None else work if isinstance(work, int) else size() if size else None
        self.description = description
        self.done = 0
        self._images = 0
        self._fields: dict[str, str] = {}
        self._clock = clock
        self._seconds = seconds
        self._marks: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)], maxlen=WINDOW)
        self._quiet_seconds = quiet_seconds
        self._began = self._printed_at = clock()
        self._printed_done = -1
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress[T]:
        self._began = self._clock()
        self._draw_bar()
        return self

    def _draw_bar(self) -> None:
        """Begin the bar if there is a terminal for it and the work lasts."""
        is_drawn = any(_is_terminal(handler) for handler in logging.getLogger().handlers)
        if process_index() == 0 and is_drawn and self._lasts():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"))
            self._bar = Bar(*columns, console=_terminal())
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, facts=self.facts())

    def _lasts(self) -> bool:
        return self._clock() - self._began >= self._quiet_seconds

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif process_index() == 0 and self.done != self._printed_done and self._lasts():
            self._print()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items or ():
                yield item
                self.advance()

    def start_at(self, done: int) -> None:
        """Begin in the middle (a resumed run): what was done earlier does not count for the speed."""
        self.done = done
        self._marks = deque([(self._clock(), done, self._images)], maxlen=WINDOW)

    def advance(self, count: int = 1, images: int = 0, **fields: float | str) -> None:
        """``count`` more pieces are done, with ``images`` images in them; ``fields`` are shown as given (loss=0.1)."""
        self.done += count
        self._images += images
        for name, value in fields.items():
            self._fields[name] = f"{value:.4g}" if isinstance(value, float) else str(value)
        now = self._clock()
        self._marks.append((now, self.done, self._images))
        if self._bar is None and self._quiet_seconds:
            self._draw_bar()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, facts=self.facts())
        elif process_index() == 0 and now - self._printed_at >= self._seconds:
            self._print()

    def facts(self) -> str:
        """The part of the line behind the description: count, fields, speed, time left."""
        (start, done_then, images_then), (now, _, _) = self._marks[0], self._marks[-1]
        parts = [str(self.done) if self.total is None else f"{self.done}/{self.total}"]
        parts += [f"{name} {value}" for name, value in self._fields.items()]
        passed, done = now - start, self.done - done_then
        if passed > 0 and self._images > images_then:
            parts.append(f"{(self._images - images_then) / passed:.3g} images/s")
        if passed > 0 and done > 0 and self.total is not None and self.total > self.done:
            parts.append(f"{_duration((self.total - self.done) * passed / done)} left")
        return " | ".join(parts)

    def _print(self) -> None:
        self._printed_at, self._printed_done = self._clock(), self.done
        logger.info("%s: %s", self.description, self.facts())


def progress(
    work: Iterable[T] | int | None, description: str, *, total: int | None = None, quiet_seconds: float = 0.0
) -> Progress[T]:
    """Progress over an iterable (iterate over the result) or ``work`` pieces (``with`` and `Progress.advance`).

    ``quiet_seconds``: work that is done sooner shows nothing.
    """
    return Progress(work, description, total=total, quiet_seconds=quiet_seconds)
