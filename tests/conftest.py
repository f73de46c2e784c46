"""What holds for every test: one thread, no network but this machine, settings of hypothesis."""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Set before torch is imported anywhere: two workers with two threads each are far slower than with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from library.log import OTHER_LOGGERS, OWN_LOGGERS, is_own_handler

settings.register_profile("house", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


def _is_local(address: Any) -> bool:
    """True for a Unix socket and for a loopback address."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed may hold names of files that are no text; a worker of xdist cannot send them as they are."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection that leaves this machine fails at once, so that no test depends on a download."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            raise OSError(f"tests must not use the network: {address}")
        connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def fresh_generator() -> None:
    """Each test draws the same numbers in any order of the tests: the weights of modules come from this generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Each test begins with logging as a new process has it, whatever an earlier one or a shared fixture set up."""
    _reset_logging()
    yield
    _reset_logging()


def _reset_logging() -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if is_own_handler(handler)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.WARNING)
    for name in (*OWN_LOGGERS, *OTHER_LOGGERS):
        logging.getLogger(name).setLevel(logging.NOTSET)


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: let the garbage collector not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds the entry scripts."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def examples_dir(project_root: Path) -> Path:
    """The small built-in model, photos and configs."""
    return project_root / "examples"
