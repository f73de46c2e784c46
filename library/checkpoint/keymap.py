"""Two-way correspondence between the names in a single file and the names in a Diffusers folder.

One list of rows serves both directions. Names of a Diffusers folder are the canonical ones of the program (text
encoders with ``text_model.``, whatever the library calls its modules in memory).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from library.checkpoint.io import LazyTensor, ModelFile
from library.log import UserError

if TYPE_CHECKING:
    from torch import Tensor

    CanonicalParts = Mapping[str, Mapping[str, Tensor | LazyTensor]]

MAX_LISTED = 12


class Operation(Enum):
    """How the canonical tensor comes out of the file's tensor."""

    COPY = "copy"
    SQUEEZE_HW = "squeeze_hw"  # the file has two trailing sides of 1
    ROWS_0_OF_3 = "rows_0_of_3"  # the j-th third of the rows; three rows of the map share one file key
    ROWS_1_OF_3 = "rows_1_of_3"
    ROWS_2_OF_3 = "rows_2_of_3"
    TRANSPOSE = "transpose"

    @property
    def third(self) -> int | None:
        """Which third of the rows, or None."""
        return int(self.value[5]) if self.value.startswith("rows_") else None


ROWS = (Operation.ROWS_0_OF_3, Operation.ROWS_1_OF_3, Operation.ROWS_2_OF_3)


@dataclass(frozen=True, slots=True)
class Row:
    """``file_key`` in the single file holds ``part``/``key`` of the Diffusers layout."""

    file_key: str
    part: str
    key: str
    operation: Operation = Operation.COPY


@dataclass(frozen=True, slots=True)
class KeyMap:
    """All rows of an architecture. ``ignorable`` matches file keys that carry nothing we need."""

    rows: tuple[Row, ...]
    prefixes: tuple[str, ...]  # the file's parts; a key under one of them must be known
    ignorable: re.Pattern[str]

    def part(self, name: str) -> dict[str, Row]:
        """Rows of one part by canonical key."""
        return {row.key: row for row in self.rows if row.part == name}

    def check(self, file_keys: Iterable[str], where: str, parts: Iterable[str] | None = None) -> list[str]:
        """Raise UserError that lists missing and unknown keys; return keys outside all parts that nobody reads.

        ``parts``: only these parts are needed (unknown keys are then looked for in their prefixes only).
        """
        present = set(file_keys)
        wanted = set(parts) if parts is not None else {row.part for row in self.rows}
        known = {row.file_key for row in self.rows}
        needed = {row.file_key for row in self.rows if row.part in wanted}
        used = tuple(prefix for prefix in self.prefixes if any(key.startswith(prefix) for key in needed))
        missing = sorted(needed - present)
        unread = sorted(key for key in present - known if not self.ignorable.search(key))
        unknown = [key for key in unread if key.startswith(used)]
        raise_key_problems(missing, unknown, where)
        return [key for key in unread if not key.startswith(self.prefixes)]

    def to_file(self, parts: CanonicalParts) -> dict[str, LazyTensor]:
        """The single file's tensors, in row order, each made when written. ``parts``: canonical state per part."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.part in parts:
                grouped.setdefault(row.file_key, []).append(row)
        return {file_key: file_tensor(rows, parts) for file_key, rows in grouped.items()}


def raise_key_problems(missing: list[str], unknown: list[str], where: str) -> None:
    """One UserError for all wrong keys of a file; nothing if there are none."""
    problems = [
        f"{len(keys)} {word}: {', '.join(keys[:MAX_LISTED])}{' ...' if len(keys) > MAX_LISTED else ''}"
        for word, keys in (("missing", missing), ("unknown", unknown))
        if keys
    ]
    if problems:
        raise UserError(f"{where}: its tensors do not fit this kind of model; {'; '.join(problems)}")


def from_file(tensor: Tensor, row: Row, shape: tuple[int, ...]) -> Tensor:
    """The canonical tensor of ``shape`` out of the file's tensor.

    Trailing sides of 1 may be there or not, whatever the row says: both forms exist in the wild.
    """
    third = row.operation.third
    if third is not None:
        rows = tensor.shape[0] // 3
        tensor = tensor[third * rows : (third + 1) * rows]
    if row.operation is Operation.TRANSPOSE:
        tensor = tensor.T
    return fit_shape(tensor, shape)


def same_matrix(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """True if the shapes differ at most in the trailing sides of a 1x1 kernel."""
    return _core(shape) == _core(other)


def fit_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Add or drop trailing sides of 1; ValueError if that does not make the shape."""
    if not same_matrix(tuple(tensor.shape), shape):
        raise ValueError(f"shape {tuple(tensor.shape)} where {shape} belongs")
    return tensor.reshape(shape)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 4-D 1x1 kernel counts as its matrix."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def canonical_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the canonical tensor in a file's tensor of ``shape``; of COPY rows it may have sides of 1 or not."""
    if row.operation.third is not None:
        return (shape[0] // 3, *shape[1:])
    if row.operation is Operation.SQUEEZE_HW:
        return _core(shape)
    return shape[::-1] if row.operation is Operation.TRANSPOSE else shape


def file_tensor(rows: list[Row], parts: CanonicalParts) -> LazyTensor:
    """The tensor of a single file that these rows of one file key make."""
    first = parts[rows[0].part][rows[0].key]
    shape = tuple(first.shape)
    if rows[0].operation is Operation.SQUEEZE_HW and len(shape) == 2:
        shape = (*shape, 1, 1)
    elif rows[0].operation is Operation.TRANSPOSE:
        shape = (shape[1], shape[0])
    elif rows[0].operation.third is not None:
        if [row.operation for row in rows] != list(ROWS):
            raise ValueError(f"{rows[0].file_key} needs its three thirds in order")
        shape = (3 * shape[0], *shape[1:])
    return LazyTensor(first.dtype, shape, _reader(rows, parts, shape))


def _reader(rows: list[Row], parts: CanonicalParts, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        import torch

        values = [parts[row.part][row.key] for row in rows]
        tensors = [value.read() if isinstance(value, LazyTensor) else value.detach() for value in values]
        if len(tensors) > 1:
            return torch.cat([tensor.cpu() for tensor in tensors])
        tensor = tensors[0].T if rows[0].operation is Operation.TRANSPOSE else tensors[0]
        return tensor.reshape(shape)

    return read


class MappedFile:
    """A single file seen through a key map: canonical tensors of one part, in the order of the file's data."""

    def __init__(self, file: ModelFile, rows: Mapping[str, Row], aliases: Mapping[str, str]) -> None:
        self._file = file
        self._rows = rows
        self._aliases = aliases  # file key of the map -> key that the file really has

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        """(canonical key, tensor of the wanted shape), one file tensor in memory at a time."""
        by_file_key: dict[str, list[Row]] = {}
        for key in shapes:
            row = self._rows[key]
            by_file_key.setdefault(self._aliases.get(row.file_key, row.file_key), []).append(row)
        wrong: list[str] = []
        for file_key in self._file.infos:
            rows = by_file_key.get(file_key, [])
            tensor = self._file.tensor(file_key) if rows else None
            for row in rows:
                if tensor is None:
                    continue
                try:
                    yield row.key, from_file(tensor, row, shapes[row.key])
                except ValueError as error:
                    wrong.append(f"{file_key}: {error}")
        if wrong:
            raise UserError(
                f"{self._file.path}: {len(wrong)} tensors have a wrong shape: {'; '.join(wrong[:MAX_LISTED])}"
            )
