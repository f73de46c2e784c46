"""A whole model as tensors that are read one by one, whatever form its files have: for tools that change or compare
models without holding one in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.checkpoint.io import LazyTensor, ModelFile, open_model_file
from library.checkpoint.keymap import Row, canonical_shape, file_tensor, fit_shape, from_file
from library.models import build
from library.models.load import (
    IGNORABLE_FOLDER_KEY,
    Recognised,
    canonical_key,
    checked_table,
    empty_part,
    recognise,
    weight_files,
)
from library.models.spec import WEIGHT_STEMS

Parts = Mapping[str, Mapping[str, LazyTensor]]
SINGLE_FILE = ""


@dataclass(frozen=True)
class OpenModel:
    """A model whose files are open; see `open_model`.

    ``parts``: tensors by part and canonical key (a Diffusers folder's). A 1x1 convolution may also be a matrix: both
    forms exist in files. ``stored``: all tensors as they stand, by place (a part's folder, or `SINGLE_FILE`) and key.
    """

    path: Path
    found: Recognised
    metadata: Mapping[str, str]
    parts: Parts
    stored: Parts
    _rows: Mapping[str, Sequence[Row]]

    @property
    def is_folder(self) -> bool:
        """True for a Diffusers folder."""
        return SINGLE_FILE not in self.stored

    def in_place(self, changed: Parts) -> Parts:
        """`stored` with these tensors of `parts` in the place of the old ones; the others are passed through."""
        if self.is_folder:
            return {place: self._folder_part(place, changed.get(place, {})) for place in self.stored}
        merged = {part: {**tensors, **changed.get(part, {})} for part, tensors in self.parts.items()}
        old = self.stored[SINGLE_FILE]
        new: dict[str, LazyTensor] = {}
        for key, value in old.items():
            rows = self._rows.get(key, ())
            touched = any(row.key in changed.get(row.part, {}) for row in rows)
            new[key] = _shaped(file_tensor([*rows], merged), value) if touched else value
        return {SINGLE_FILE: new}

    def fitted(self, parts: Parts) -> Parts:
        """The same tensors in the shapes that the libraries' modules have, for writing the model in another form."""
        shapes = {name: build.shapes_of(empty_part(name, self.found.spec)) for name in parts}
        return {
            name: {key: _fitted(tensors[key], shape) for key, shape in shapes[name].items()}
            for name, tensors in parts.items()
        }

    def _folder_part(self, place: str, changed: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        keys = ((key, canonical_key(place, key)) for key in self.stored[place])
        return {key: changed.get(canonical, self.stored[place][key]) for key, canonical in keys}


@contextlib.contextmanager
def open_model(path: Path, variant: str | None = None) -> Generator[OpenModel]:
    """Open a single file or a Diffusers folder of SD1, SD2 or SDXL. Costs the headers only (a pickle is mapped).

    ``variant`` chooses among the files of a folder. Raises UserError for anything else and for tensors that are
    missing or unknown.
    """
    found = recognise(path)
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            names = (*found.spec.text_parts, "unet", "vae")
            files = {name: _opened(stack, weight_files(path / name, WEIGHT_STEMS[name], variant)) for name in names}
            stored = {name: {key: file.lazy(key) for file in own for key in file.infos} for name, own in files.items()}
            yield OpenModel(path, found, {}, _canonical_parts(stored), stored, {})
        else:
            (file,) = _opened(stack, [path])
            rows = _rows_of(file, found)
            stored = {SINGLE_FILE: {key: file.lazy(key) for key in file.infos}}
            yield OpenModel(path, found, file.metadata, _parts_of(rows, stored[SINGLE_FILE]), stored, rows)


def _opened(stack: contextlib.ExitStack, paths: Sequence[Path]) -> list[ModelFile]:
    return [stack.enter_context(open_model_file(path)) for path in paths]


def _canonical_parts(stored: Parts) -> dict[str, dict[str, LazyTensor]]:
    return {
        part: {
            canonical_key(part, key): value for key, value in tensors.items() if not IGNORABLE_FOLDER_KEY.search(key)
        }
        for part, tensors in stored.items()
    }


def _rows_of(file: ModelFile, found: Recognised) -> dict[str, list[Row]]:
    """The rows of the key table by the keys that the file really has. Raises UserError for keys that do not fit."""
    table, others, _ = checked_table(file, found.spec)
    rows: dict[str, list[Row]] = {}
    for row in table.rows:
        rows.setdefault(others.get(row.file_key, row.file_key), []).append(row)
    return rows


def _parts_of(rows: Mapping[str, Sequence[Row]], stored: Mapping[str, LazyTensor]) -> dict[str, dict[str, LazyTensor]]:
    parts: dict[str, dict[str, LazyTensor]] = {}
    for key, own in rows.items():
        for row in own:
            parts.setdefault(row.part, {})[row.key] = _canonical(stored[key], row)
    return parts


def _canonical(value: LazyTensor, row: Row) -> LazyTensor:
    shape = canonical_shape(row, value.shape)
    return LazyTensor(value.dtype, shape, lambda: from_file(value.read(), row, shape))


def _shaped(value: LazyTensor, like: LazyTensor) -> LazyTensor:
    return LazyTensor(like.dtype, like.shape, lambda: value.read().reshape(like.shape))


def _fitted(value: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    def read() -> Tensor:
        return fit_shape(value.read(), shape)

    return LazyTensor(value.dtype, shape, read)
