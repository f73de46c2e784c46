"""The one place that opens and writes model files, and the helper that makes every write whole or absent.

Nothing heavy is imported at the top, so that option and data code can use `atomic_path` cheaply.
File formats: safetensors (read and written tensor by tensor) and torch pickles (how they are read: `pickles`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library.checkpoint.pickles import tensors_of_pickle
from library.log import UserError

if TYPE_CHECKING:
    from torch import Tensor, dtype

StrPath = str | os.PathLike[str]

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

# safetensors type name -> torch attribute
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class WriteError(UserError, OSError):
    """A file could not be written: disk full, no permission. Also an OSError, for callers that can go on without it."""


# ---- atomic writes


@contextlib.contextmanager
def atomic_path(target: StrPath, *, durable: bool = True) -> Generator[Path]:
    """Give a temporary path in the target's folder; rename it to ``target`` when the block ends well.

    The temporary name is hidden and keeps the target's suffix (numpy and others append one otherwise). On any
    exception the temporary file is removed and an existing target stays as it was. ``durable=False`` skips the flush
    to the disk: for caches, whose readers check what they read. Missing folders are made; a symbolic link is followed.

    Raises WriteError (a UserError) for a full disk or a folder without permission.
    """
    final = Path(os.path.realpath(target))
    temporary = final.with_name(f".{final.stem[:80]}.{secrets.token_hex(4)}.tmp{final.suffix}")
    try:
        with told_write_problems(final, temporary):
            final.parent.mkdir(parents=True, exist_ok=True)
            # made here so that the mode is what the umask says, whatever the writer inside does
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            if durable:
                flush_file(temporary)
            os.replace(temporary, final)
            if durable:
                flush_folder(final.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(target: StrPath, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file at once, see `atomic_path`."""
    with atomic_path(target, durable=durable) as path:
        path.write_bytes(data)


def atomic_write_text(target: StrPath, text: str, *, durable: bool = True) -> None:
    """Write UTF-8 text with plain line feeds, see `atomic_path`.

    Of a file's name that is no text the strange bytes are written as escapes (``\\udce9``), which JSON reads back.
    """
    atomic_write_bytes(target, text.encode("utf-8", "backslashreplace"), durable=durable)


def atomic_write_json(target: StrPath, value: Any, *, indent: int | None = 2, durable: bool = True) -> None:
    """Write a value as UTF-8 JSON, see `atomic_path`."""
    atomic_write_text(target, json.dumps(value, ensure_ascii=False, indent=indent) + "\n", durable=durable)


def flush_file(path: Path) -> None:
    """Make a file's content survive a power cut. Windows flushes only what may be written."""
    with path.open("rb+" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def told_write_problems(final: Path, temporary: Path) -> Generator[None]:
    """An OSError of the block becomes a WriteError that says what to do; one that is not about ``final`` passes.

    ``temporary`` is the name that it was written under, in which users see no sense: also not in the message of
    something that was itself written whole inside.
    """
    try:
        yield
    except OSError as error:
        problem = _write_problem(error, final, temporary)
        if problem is None:
            raise
        raise problem from error


def _write_problem(error: OSError, final: Path, temporary: Path) -> WriteError | None:
    if isinstance(error, WriteError):
        text = str(error).replace(str(temporary), str(final))
        if text == str(error):
            return None
    elif error.errno in _FULL:
        free = _free_megabytes(final.parent)
        text = f"the disk is full: could not write {final} ({free} MB free); free some space or choose another folder"
    elif error.errno in _FORBIDDEN and _is_of(error.filename, final, temporary):
        text = f"no permission to write {final}; choose a folder that you may write to"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR):
        text = f"cannot write {final}: {error.strerror}; choose another name"
    else:
        return None
    problem = WriteError(text)
    problem.errno = error.errno
    return problem


def _is_of(name: str | None, final: Path, temporary: Path) -> bool:
    return name in (None, str(final), str(final.parent)) or temporary in (Path(name), *Path(name).parents)


def _free_megabytes(folder: Path) -> int | str:
    try:
        return shutil.disk_usage(folder).free // 1_000_000
    except OSError:
        return "?"


# ---- reading


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of one tensor. ``dtype`` is the safetensors type name (F32, F16, BF16 ...)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> dtype:
        """The same as a torch type."""
        return torch_dtype(self.dtype)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor to be written later: type and shape now, ``read`` when its turn comes."""

    dtype: dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class ModelFile:
    """A model file that is open for reading: headers at once, tensors one by one. A context manager.

    ``infos`` keeps the order of the data in the file, so that reading in this order is sequential.
    """

    def __init__(self, path: Path, infos: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        self.path = path
        self.infos = infos
        self.metadata = metadata

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""

    def tensor(self, key: str) -> Tensor:
        """One tensor on the CPU, in the file's type, in memory of its own where the format allows."""
        raise NotImplementedError

    def lazy(self, key: str) -> LazyTensor:
        """The tensor for `save_safetensors`, read when it is written."""
        info = self.infos[key]
        return LazyTensor(info.torch_dtype, info.shape, lambda: self.tensor(key))


class _SafetensorsFile(ModelFile):
    def __init__(self, path: Path) -> None:
        infos, metadata, self._starts = _parse_header(path)
        super().__init__(path, infos, metadata)
        self._file: BinaryIO = path.open("rb", buffering=0)

    def close(self) -> None:
        self._file.close()

    def tensor(self, key: str) -> Tensor:
        # Read into fresh memory instead of mapping: pages of a mapping count as ours and would double the peak.
        import torch

        info = self.infos[key]
        result = torch.empty(info.shape, dtype=info.torch_dtype)
        if result.numel():
            array: Any = result.reshape(-1).view(torch.uint8).numpy()
            view = memoryview(array)
            self._file.seek(self._starts[key])
            done = 0
            while done < len(view):
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise UserError(f"{self.path} ended while it was read (tensor {key}): copy or download it again")
                done += count
        return result


class _PickleFile(ModelFile):
    def __init__(self, path: Path) -> None:
        self._tensors = tensors_of_pickle(path)
        infos = {key: TensorInfo(type_name(t.dtype), tuple(t.shape)) for key, t in self._tensors.items()}
        super().__init__(path, infos, {})

    def close(self) -> None:
        self._tensors = {}

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def open_model_file(path: StrPath) -> ModelFile:
    """Open a safetensors file or a torch pickle (.ckpt, .pt, .bin ...); the content decides, not the extension.

    A pickle's ``state_dict`` entry (of an embedding ``string_to_param``) is unwrapped. Raises UserError for a missing
    or cut file, and for a pickle that would run code.
    """
    return _SafetensorsFile(Path(path)) if is_safetensors(path) else _PickleFile(Path(path))


def is_safetensors(path: StrPath) -> bool:
    """Decided by content; raises UserError for what is no model file at all."""
    try:
        with (path := Path(path)).open("rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise UserError(f"{path} is empty: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is only a Git LFS pointer, not the model: run `git lfs pull` in its folder")
    return path.suffix.lower() == ".safetensors" or (len(start) > 8 and start[8:9] == b"{")


def read_header(path: StrPath) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensor types and shapes, and metadata. Costs only the header for a safetensors file, a load for a pickle."""
    if is_safetensors(path):
        infos, metadata, _ = _parse_header(Path(path))
        return infos, metadata
    with open_model_file(path) as file:
        return file.infos, {}


def _parse_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, int]]:
    """(tensors in data order, metadata, absolute start of each tensor's bytes)."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path} is not a safetensors file (its header would take {length} bytes)")
            raw = file.read(length)
        if len(raw) < length:
            raise UserError(f"{path} is cut short: it ends within its header; copy or download it again")
        header: dict[str, Any] = json.loads(raw)
        metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        rows = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        infos = {key: TensorInfo(row["dtype"], tuple(row["shape"])) for key, row in rows}
        starts = {key: 8 + length + row["data_offsets"][0] for key, row in rows}
        ends = {key: 8 + length + row["data_offsets"][1] for key, row in rows}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a readable safetensors file: its header is damaged") from error
    expected = max(ends.values(), default=8 + length)
    if size < expected:
        raise UserError(f"{path} is cut short: {size:,} of {expected:,} bytes; copy or download it again")
    for key, info in infos.items():
        if info.dtype not in _TORCH_NAMES or ends[key] - starts[key] != _byte_count(info):
            raise UserError(f"{path}: the header entry of tensor {key} is damaged ({info.dtype}, shape {info.shape})")
    return infos, metadata, starts


def _byte_count(info: TensorInfo) -> int:
    count = info.torch_dtype.itemsize
    for side in info.shape:
        count *= side
    return count


# ---- writing


def torch_dtype(name: str) -> dtype:
    """The torch type of a safetensors type name."""
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def type_name(value: dtype) -> str:
    """The safetensors type name of a torch type."""
    short = str(value).removeprefix("torch.")
    for name, torch_name in _TORCH_NAMES.items():
        if torch_name == short:
            return name
    raise ValueError(f"safetensors files cannot hold {value}")


def stored_dtype(value: Tensor | LazyTensor, cast: dtype | None) -> dtype:
    """The type in which a tensor is written: ``cast`` for floating point tensors, else its own."""
    return cast if cast is not None and value.dtype.is_floating_point else value.dtype


def safetensors_header(
    tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str] | None, cast: dtype | None
) -> tuple[bytes, list[str]]:
    """The first bytes of the file up to the data, and the order of the data (wide types first, then by name)."""
    types = {key: stored_dtype(value, cast) for key, value in tensors.items()}
    order = sorted(tensors, key=lambda key: (-types[key].itemsize, key))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {str(key): str(metadata[key]) for key in sorted(metadata)}
    offset = 0
    for key in order:
        shape = list(tensors[key].shape)
        end = offset + _byte_count(TensorInfo(type_name(types[key]), tuple(shape)))
        header[key] = {"dtype": type_name(types[key]), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def tensor_bytes(value: Tensor | LazyTensor, cast: dtype | None) -> memoryview:
    """The bytes of one tensor as they stand in a file."""
    import torch

    tensor = value.read() if isinstance(value, LazyTensor) else value
    flat = tensor.detach().to("cpu", stored_dtype(value, cast)).contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def save_safetensors(
    path: StrPath,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    dtype: dtype | None = None,
) -> None:
    """Write a safetensors file tensor by tensor; the same content gives the same bytes.

    ``dtype`` is what floating point tensors are cast to (None: as they are). One converted tensor at a time is in
    memory. Raises WriteError; the final name is never half written.
    """
    header, order = safetensors_header(tensors, metadata, dtype)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for key in order:
            file.write(tensor_bytes(tensors[key], dtype))


def save_pickle(
    path: StrPath,
    tensors: Mapping[str, Tensor | LazyTensor],
    dtype: dtype | None = None,
    beside: Mapping[str, object] | None = None,
) -> None:
    """Write a torch pickle of the tensors, cast as in `save_safetensors`; all are in memory at once.

    With ``beside`` (plain values) they stand in its entry ``state_dict``, next to these. Metadata have no place in a
    pickle. The same content gives the same bytes. Raises WriteError.
    """
    import torch

    state: dict[str, object] = {key: _alone(value, dtype) for key, value in tensors.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state if beside is None else {"state_dict": state, **beside}, file)
        except RuntimeError as error:  # of torch's own, who cannot end the file that the disk had no room for
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _alone(value: Tensor | LazyTensor, cast: dtype | None) -> Tensor:
    tensor = value.read() if isinstance(value, LazyTensor) else value
    tensor = tensor.detach().to("cpu", stored_dtype(value, cast))
    # of a view torch would write all that it is a view of
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
