"""Moving bad images aside, with their captions and caches, so that every move can be undone."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from library.checkpoint.io import atomic_write_json
from library.data.index import CAPTION_EXTENSIONS
from library.log import UserError
from library.preparation.check import CheckReport

logger = logging.getLogger(__name__)
RECORD_NAME = "quarantine.json"
_CACHE_END = re.compile(r"(?:_\d+x\d+_[0-9a-f]+|_te_outputs\w*)?\.npz")


@dataclass(frozen=True, slots=True)
class Move:
    """One file, where it goes, and why."""

    source: str
    target: str
    reason: str


def plan_moves(report: CheckReport, kinds: Collection[str], folder: Path) -> list[Move]:
    """The moves for findings of some kinds: each image with its captions and caches, below its folder's name.

    Of duplicates the one to keep stays. A caption or cache that an image which stays shares by its stem stays too.
    """
    reasons: dict[str, str] = {}
    for finding in report.findings:
        # an entry of a metadata file whose image is missing has nothing to move
        if finding.kind in kinds and not finding.stays and os.path.isfile(finding.path):
            detail = f" ({finding.detail})" if finding.detail else ""
            reasons.setdefault(finding.path, f"{finding.kind}{detail}")
    staying = {_stem(path) for path in report.paths if path not in reasons}
    listings: dict[str, list[str]] = {}
    moves: dict[str, Move] = {}
    taken: set[str] = set()
    for path, reason in reasons.items():
        place = os.path.dirname(path)
        if place not in listings:
            listings[place] = sorted(os.listdir(place or "."))
        own = [path]
        if _stem(path) not in staying:
            own += _belonging(path, listings[place], report.paths.get(path))
        for source in own:
            if source not in moves:
                moves[source] = Move(source, _free_name(source, folder, taken), reason)
    return list(moves.values())


def carry_out(moves: Iterable[Move], folder: Path) -> int:
    """Write what will be done to ``quarantine.json`` in the folder, behind what is there, and do it.

    Returns the number of files moved; one that cannot be moved is named and stays. Raises UserError for a record that
    cannot be read, before anything is moved.
    """
    listed, moved = list(moves), 0
    if not listed:
        return moved
    record = folder / RECORD_NAME
    earlier = _read_record(record)
    atomic_write_json(record, [*earlier, *(asdict(move) for move in listed)])
    for move in listed:
        try:
            Path(move.target).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(move.source, move.target)
            moved += 1
        except OSError as error:
            logger.warning("%s: stays where it is: it cannot be moved (%s)", move.source, error.strerror or error)
    return moved


def _read_record(path: Path) -> list[Mapping[str, str]]:
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away, or choose another --quarantine") from error


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _belonging(path: str, listing: Sequence[str], caption_path: str | None) -> list[str]:
    """Captions and caches of an image among the sorted names of its folder, and its caption of an unusual suffix."""
    place, stem = os.path.dirname(path), os.path.basename(_stem(path))
    found: list[str] = []
    for name in listing[bisect_left(listing, stem) :]:
        if not name.startswith(stem):
            break
        ending = name[len(stem) :]
        if ending.lower() in CAPTION_EXTENSIONS or _CACHE_END.fullmatch(ending):
            found.append(os.path.join(place, name))
    if caption_path is not None and _stem(caption_path) == _stem(path) and caption_path not in found:
        found.append(caption_path)
    return found


def _free_name(source: str, folder: Path, taken: set[str]) -> str:
    """A path in the quarantine, below the name of the file's folder, that nothing has yet."""
    path = Path(source)
    base = folder / path.resolve().parent.name
    target, number = base / path.name, 1
    while target.exists() or str(target) in taken:
        target, number = base / f"{path.stem}~{number}{path.suffix}", number + 1
    taken.add(str(target))
    return str(target)
