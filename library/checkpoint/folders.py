"""Folders that are whole or absent under their own name: models, states, networks of several files.

A new folder is written beside its place. An older one is moved aside under a name that is known from its own, then the
new one takes the place. A program that is killed between these two renames leaves no folder of that name but both of
them whole beside it; `recover` puts the older one back.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path

from library.checkpoint.io import StrPath, flush_file, flush_folder, told_write_problems

_ASIDE = ".former"


@contextlib.contextmanager
def atomic_folder(target: StrPath) -> Generator[Path]:
    """Give a temporary folder beside ``target``; all in it is flushed and it is renamed when the block ends well.

    Until then, and on any exception, an existing target stays as it was; it is removed last. What killed programs left
    of the same folder is put back or removed first. Missing folders above it are made; a symbolic link is followed.
    Raises WriteError (a UserError) for a full disk or a folder without permission.
    """
    final = Path(os.path.realpath(target))
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        with told_write_problems(final, temporary):
            final.parent.mkdir(parents=True, exist_ok=True)
            _remove(*_left_over(final))
            recover(final)
            temporary.mkdir()
            yield temporary
            _flush_tree(temporary)
            _swap(temporary, final)
    finally:
        _remove(temporary)


def recover(folder: Path) -> None:
    """Put a folder back to its name if a program was killed while it was replaced; else nothing."""
    if not folder.exists() and _aside(folder).is_dir():
        os.replace(_aside(folder), folder)


def recover_all(parent: Path, name: re.Pattern[str]) -> None:
    """`recover` every folder whose name matches, and remove older ones whose successor is in place."""
    for aside in list(parent.iterdir()) if parent.is_dir() else ():
        own = aside.name.removeprefix(".").removesuffix(_ASIDE)
        if aside == _aside(parent / own) and name.fullmatch(own):
            recover(parent / own)
            _remove(aside)


def _swap(temporary: Path, final: Path) -> None:
    former = _aside(final)
    _remove(former)
    if final.exists():
        os.replace(final, former)
    try:
        os.replace(temporary, final)
    except BaseException:
        recover(final)
        raise
    flush_folder(final.parent)
    _remove(former)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_ASIDE}")


def _left_over(final: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{8}}\.tmp")
    return [path for path in final.parent.iterdir() if pattern.fullmatch(path.name)]


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            flush_file(path)
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
