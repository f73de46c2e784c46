"""Ctrl-C and termination: the first asks the run to finish its step, save and end; the second stops it at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """Set by the first signal; the loop reads it between steps."""

    def __init__(self, promise: str) -> None:
        self.is_set = False
        self._promise = promise

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        logger.warning("%s; press Ctrl-C again to stop at once", self._promise)


@contextmanager
def stop_at_once() -> Generator[None]:
    """Inside the block the first signal raises KeyboardInterrupt: nothing is under way that is worth finishing."""
    with _handled_by(signal.default_int_handler):
        yield


@contextmanager
def stop_on_signals(promise: str = "stopping after this step and saving") -> Generator[StopRequest]:
    """Listen for SIGINT and SIGTERM inside the block, and give the old handlers back after it.

    ``promise``: what the first signal makes the program say.
    """
    request = StopRequest(promise)
    with _handled_by(request.handle):
        yield request


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], Any]) -> Generator[None]:
    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals cannot be handled here
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
