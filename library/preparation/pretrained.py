"""Models of the transformers library, from a local folder or the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.log import UserError, first_line

logger = logging.getLogger(__name__)

_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def load_pretrained(load: Callable[..., Any], name: str, option: str, example: str) -> Any:
    """What ``load`` (a ``from_pretrained``) makes of a folder or a hub id; the copy on this machine comes first.

    Raises UserError that names the option, and for a file or address of another program's weights what to give
    instead (``example``).
    """
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()  # of the weights: over before it is read, and in the way of ours
    place = Path(name).expanduser()
    if place.is_file() or "://" in name or name.lower().endswith(_FILE_SUFFIXES):
        raise UserError(
            f"{option} {name}: a single weights file of another program is not read here; give the same model as a "
            f"folder in the form of transformers, or its hub id ({example})"
        )
    if place.is_dir():
        return _told(lambda: load(str(place), local_files_only=True), f"{option} {name}: it cannot be read")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{option} {name}: there is no such folder")
    try:
        return load(name, local_files_only=True)
    except Exception:  # not on this machine, or not whole: each part of the library has its own errors
        logger.info("%s: not whole on this machine, asking the hub", name)
        return _told(lambda: load(name), f"{option} {name}: no such folder here, and the hub did not give it")


def _told(action: Callable[[], Any], start: str) -> Any:
    try:
        return action()
    except Exception as error:  # the library raises many kinds for damaged folders and for the network
        raise UserError(f"{start} ({first_line(error)})") from error
