"""A safetensors file with other metadata: the header is made anew, the tensors are copied as they are."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from library.checkpoint.hashes import LEGACY_HASH_KEY, LEGACY_LENGTH, LEGACY_START, MODEL_HASH_KEY
from library.checkpoint.io import StrPath, atomic_path, is_safetensors, read_header
from library.log import UserError, progress

_CHUNK_BYTES = 1 << 24
_LARGE_CHUNKS = 32  # half a gigabyte: more takes seconds


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What was written. ``sha256``: of the tensors' bytes, the same in both files."""

    metadata: Mapping[str, str]
    sha256: str


def rewrite_metadata(source: StrPath, target: StrPath, metadata: Mapping[str, str]) -> Rewritten:
    """Write ``source`` to ``target`` (which may be the same file) with this metadata and the very same tensors.

    Entries ``sshs_*`` that are among ``metadata`` are set to what a reader computes from the new file. The data are
    streamed and compared after writing. Raises UserError for a source that is no whole safetensors file.
    """
    source, target = Path(source), Path(target)
    if not is_safetensors(source):
        raise UserError(f"{source} is no safetensors file; only those have metadata")
    read_header(source)  # refuses what is damaged or cut short
    rows, start = _rows(source)
    before = _sha256(source, start, f"reading {source.name}")
    entries = dict(metadata)
    if MODEL_HASH_KEY in entries:
        entries[MODEL_HASH_KEY] = before
    header = _header(rows, entries)
    if LEGACY_HASH_KEY in entries:  # always 8 characters, so the header keeps its length
        entries[LEGACY_HASH_KEY] = " " * 8
        entries[LEGACY_HASH_KEY] = _legacy_hash(source, start, len(_header(rows, entries)))
        header = _header(rows, entries)
    with atomic_path(target) as temporary:
        with source.open("rb") as old, temporary.open("wb") as new:
            new.write(header)
            for chunk in _chunks(old, start, f"writing {target.name}"):
                new.write(chunk)
        after = _sha256(temporary, len(header), f"checking {target.name}")
        if after != before:
            raise UserError(f"{target}: its tensors came out changed; {source.name} was changed meanwhile, or the disk")
    return Rewritten(entries, before)


def _rows(path: Path) -> tuple[dict[str, Any], int]:
    """The header without metadata, in its own order, and where the data start."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _header(rows: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    ordered = {key: metadata[key] for key in sorted(metadata)}
    whole = {**({"__metadata__": ordered} if ordered else {}), **rows}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _legacy_hash(source: Path, old_start: int, new_start: int) -> str:
    """Hash of 64 KiB at 1 MiB of the new file, from the old one's data."""
    first = max(0, LEGACY_START - new_start)
    last = max(0, LEGACY_START + LEGACY_LENGTH - new_start)
    with source.open("rb") as file:
        file.seek(old_start + first)
        return hashlib.sha256(file.read(last - first)).hexdigest()[:8]


def _chunks(file: BinaryIO, start: int, description: str) -> Iterator[bytes]:
    size = file.seek(0, 2) - start
    file.seek(start)
    count = -(-size // _CHUNK_BYTES)
    chunks = (file.read(_CHUNK_BYTES) for _ in range(count))
    yield from progress(chunks, description, total=count) if count > _LARGE_CHUNKS else chunks


def _sha256(path: Path, start: int, description: str) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file, start, description):
            digest.update(chunk)
    return digest.hexdigest()
