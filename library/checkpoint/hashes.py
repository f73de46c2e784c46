"""Hashes: those that other programs know models by, those in the metadata of network files, and those by which caches
know the weights that they were made with.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoint.io import (
    LazyTensor,
    StrPath,
    WriteError,
    atomic_write_json,
    safetensors_header,
    tensor_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

# The "legacy" hash looks only at 64 KiB that start at 1 MiB.
LEGACY_START = 0x100000
LEGACY_LENGTH = 0x10000
_CHUNK_BYTES = 1 << 22

MODEL_HASH_KEY = "sshs_model_hash"
LEGACY_HASH_KEY = "sshs_legacy_hash"


@dataclass(frozen=True, slots=True)
class FileHashes:
    """``legacy``: 8 hex digits over a small window; ``sha256``: 64 hex digits over the whole file."""

    legacy: str
    sha256: str


def file_hashes(path: StrPath) -> FileHashes:
    """Both hashes of a file. A folder gives the words that the file format uses for it (``IsADirectory``).

    The full hash is remembered per (path, size, modification time) in the user's cache folder, so that a large base
    model is read once.
    """
    path = Path(path)
    if not path.exists():
        return FileHashes("NOFILE", "NOFILE")
    if not path.is_file():
        return FileHashes("IsADirectory", "IsADirectory")
    return FileHashes(_legacy_hash(path), _Memory().sha256(path))


def network_hashes(
    tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str], dtype: dtype | None = None
) -> dict[str, str]:
    """``metadata`` with the two hash entries set, to be given to `save_safetensors` with the same tensors and type.

    Both equal what a reader computes from the finished file: sshs_model_hash over the bytes after the header,
    sshs_legacy_hash over the file's window at 1 MiB.
    """
    # hashes have a fixed length, so a header with blanks in their place is as long as the final one
    blank = {**metadata, MODEL_HASH_KEY: " " * 64, LEGACY_HASH_KEY: " " * 8}
    header, order = safetensors_header(tensors, blank, dtype)
    full = hashlib.sha256()
    window = bytearray()
    position = len(header)
    for key in order:
        data = tensor_bytes(tensors[key], dtype)
        full.update(data)
        first = max(0, LEGACY_START - position)
        last = max(0, LEGACY_START + LEGACY_LENGTH - position)
        window += data[first:last]
        position += len(data)
    legacy = hashlib.sha256(bytes(window)).hexdigest()[:8]
    return {**metadata, MODEL_HASH_KEY: full.hexdigest(), LEGACY_HASH_KEY: legacy}


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of a module's weights as they are in memory (names, shapes, types and bytes): 16 hexadecimal digits."""
    return _state_fingerprint(module.state_dict())


def fingerprints_in(module: nn.Module, types: Iterable[dtype]) -> dict[dtype, str]:
    """The `weights_fingerprint` that a module would have in other number types."""
    state = module.state_dict()
    return {kind: _state_fingerprint({name: tensor.to(kind) for name, tensor in state.items()}) for kind in types}


def _state_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor, None))
    return digest.hexdigest()


def cache_folder() -> Path:
    """The user's cache folder of this program (XDG on Linux, LOCALAPPDATA on Windows, Library/Caches on macOS)."""
    for variable in ("SD_TRAINER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        if os.environ.get(variable):
            root = Path(os.environ[variable])
            return root if variable == "SD_TRAINER_CACHE" else root / "sd-trainer"
    mac = Path.home() / "Library" / "Caches"
    return (mac if mac.is_dir() else Path.home() / ".cache") / "sd-trainer"


def _legacy_hash(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(LEGACY_START)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]


def sha256_of_file(path: StrPath) -> str:
    """SHA-256 of a whole file, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def data_sha256(path: StrPath) -> str:
    """SHA-256 of a safetensors file's bytes behind its header, read in pieces: what sshs_model_hash should be."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


_MEMORY_LOCK = threading.Lock()


class _Memory:
    """Full hashes of files seen before, in one small JSON file. Losing it costs time only."""

    def __init__(self) -> None:
        self._path = cache_folder() / "file_hashes.json"

    def sha256(self, path: Path) -> str:
        status = path.stat()
        name = str(path.resolve())
        stamp = [status.st_size, status.st_mtime_ns]
        with _MEMORY_LOCK:
            known = self._read().get(name)
        if isinstance(known, list) and len(known) == 3 and known[:2] == stamp:
            return str(known[2])
        value = sha256_of_file(path)
        with _MEMORY_LOCK:
            self._write({**self._read(), name: [*stamp, value]})
        return value

    def _read(self) -> dict[str, Any]:
        try:
            loaded = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def _write(self, rows: dict[str, Any]) -> None:
        try:
            atomic_write_json(self._path, rows, indent=None, durable=False)
        except (WriteError, OSError):
            return  # a read-only home: hash again next time
