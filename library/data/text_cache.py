"""The text encoder cache: what the text encoders made of captions, in memory and on disk, by the caption's text.

On disk each image has an archive beside it, ``<stem>_te_outputs.npz`` in the reference's format; further forms of its
caption stand in the same archive under names of ours. An archive is believed only if its fingerprint says that it was
made from these captions by these encoders and this tokenizer. If the name belongs to something else that is valid
(another image of the same stem, the same image under other caption rules), ``<stem>_<tag>_te_outputs.npz`` is used.
The image's content does not matter here. T tokens of the joined caption, D widths of all encoders together, P pooled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from library.data import cache_files
from library.data.cache import FileState, StoreNotes
from library.data.cache_files import ArchiveFacts, BrokenArchive
from library.data.caption_variants import variants_of
from library.data.images import UnreadableImage
from library.data.records import ResolvedDataset
from library.log import UserError

_FORMAT = 1
_SUFFIX = "_te_outputs.npz"
_ALIKE = 0.1  # relative distance: half precision stays far below it, other encoders or a wrong projection far above


@dataclass(frozen=True, slots=True)
class TextOutputs:
    """What all encoders gave for one caption, side by side, on the CPU. ``pooled_P`` only where the family uses it."""

    hidden_TD: Tensor
    pooled_P: Tensor | None

    def is_finite(self) -> bool:
        """True if no number is infinite or undefined."""
        return all(bool(one.isfinite().all()) for one in (self.hidden_TD, self.pooled_P) if one is not None)

    def is_like(self, other: TextOutputs) -> bool:
        """True if both were made by the same encoders, be it in other types. Shapes must be equal."""
        pairs = [(self.hidden_TD, other.hidden_TD)]
        if self.pooled_P is not None and other.pooled_P is not None:
            pairs.append((self.pooled_P, other.pooled_P))
        return all(float((a.float() - b.float()).norm()) <= _ALIKE * float(b.float().norm()) for a, b in pairs)

    def to(self, dtype: torch.dtype) -> TextOutputs:
        """A copy in another type, not a view of a batch."""
        pooled_P = None if self.pooled_P is None else self.pooled_P.to(dtype).clone()
        return TextOutputs(self.hidden_TD.to(dtype).clone(), pooled_P)


@dataclass(frozen=True, slots=True)
class TextLayout:
    """Shapes of outputs: ``tokens`` of a joined caption, ``widths`` of the encoders, width of the pooled vector."""

    tokens: int
    widths: tuple[int, ...]
    pooled_width: int | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by member name: ``hidden_state1`` and on, and ``pool`` with the number of the last encoder."""
        found: dict[str, tuple[int, ...]] = {
            f"hidden_state{number}": (self.tokens, width) for number, width in enumerate(self.widths, 1)
        }
        return found if self.pooled_width is None else {**found, f"pool{len(self.widths)}": (self.pooled_width,)}

    @property
    def size_bytes(self) -> int:
        """What the arrays of one caption take on disk."""
        return 4 * sum(math.prod(shape) for shape in self.shapes().values())

    def arrays(self, outputs: TextOutputs) -> dict[str, NDArray[Any]]:
        """The members that hold one caption's outputs, float32."""
        hidden = outputs.hidden_TD.float().split(list(self.widths), dim=-1)
        parts = hidden if outputs.pooled_P is None else (*hidden, outputs.pooled_P.float())
        return {name: np.ascontiguousarray(part) for name, part in zip(self.shapes(), parts, strict=True)}

    def outputs(self, arrays: Sequence[NDArray[Any]]) -> TextOutputs:
        """The outputs that arrays in the order of `shapes` hold, float32."""
        parts = [torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for array in arrays]
        count = len(self.widths)
        return TextOutputs(torch.cat(parts[:count], dim=-1), None if self.pooled_width is None else parts[count])


@dataclass(frozen=True, slots=True)
class TextTarget:
    """Texts that are kept together: ``on_disk`` in one archive beside the image ``path``, else in memory.

    ``stored`` is the image's caption before any rule, ``caption_path`` the file that it came from.
    """

    path: str
    texts: tuple[str, ...]
    stored: str = ""
    caption_path: str | None = None
    on_disk: bool = False


def targets_of(datasets: Sequence[ResolvedDataset], variants: int, *, to_disk: bool) -> list[TextTarget]:
    """Everything that visits of the images can ask for: on disk one target for each image and its texts, in memory one
    for each text. The empty caption of visits that drop theirs is kept in memory: each archive would repeat it.
    """
    pairs = [(record, dataset.subset_of(record).captions) for dataset in datasets for record in dataset.records]
    targets: dict[TextTarget, None] = {}
    paths: dict[str, str] = {}
    on_disk: set[str] = set()
    for record, rules in pairs:
        texts = variants_of(record, rules, variants)
        if to_disk:
            targets[TextTarget(record.path, texts, record.caption, record.caption_path, True)] = None
            on_disk.update(texts)
        else:
            paths.update({text: record.path for text in texts if text not in paths})
        if rules.can_drop:
            paths.setdefault("", record.path)
    return [*targets, *(TextTarget(path, (text,)) for text, path in paths.items() if text not in on_disk)]


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of one caption in an archive. ``fingerprint`` None: another program's archive."""

    path: Path
    number: int
    fingerprint: Mapping[str, Any] | None


class TextStore:
    """Text encoder outputs by caption. ``maker`` says what makes them (encoders, tokenizer), for the fingerprint.

    ``memory_dtype`` is the type of what is kept in memory. ``encode`` is the maker itself: archives of other programs
    do not say what made them, so the first one is compared with what it gives, and answers for all.
    """

    def __init__(
        self,
        layout: TextLayout,
        maker: Mapping[str, Any],
        *,
        to_disk: bool = False,
        memory_dtype: torch.dtype = torch.float32,
        encode: Callable[[str], TextOutputs] | None = None,
    ) -> None:
        self.to_disk = to_disk
        self.notes = StoreNotes()
        self._layout = layout
        self._maker = dict(maker)
        self._memory_dtype = memory_dtype
        self._encode = encode
        self._believes_others: bool | None = None if encode else True
        self._entries: dict[str, TextOutputs | _Slot] = {}
        self._bound: dict[TextTarget, Path] = {}
        self._write_paths: dict[TextTarget, Path] = {}

    def __contains__(self, text: str) -> bool:
        return text in self._entries

    def load(self, text: str) -> TextOutputs:
        """What was made of a caption; float32 from disk. Raises UserError for an archive that is no longer good, and
        KeyError for a caption that was not foreseen.
        """
        entry = self._entries.get(text)
        if entry is None:
            raise KeyError(f"no text encoder outputs were made ahead for the caption {text!r}")
        return entry if isinstance(entry, TextOutputs) else self._read(entry)

    def find(self, targets: Sequence[TextTarget]) -> list[int]:
        """Bind the valid archives of targets and return the positions of those that have none.

        It also fixes where each missing one will be written, the same in every process that asks before anything was
        written.
        """
        missing = [position for position, target in enumerate(targets) if not self.fetch(target)]
        claimed = set(self._bound.values())
        for target in (targets[position] for position in missing):
            if target.on_disk:
                self._write_paths[target] = path = self._choose_path(target, claimed)
                claimed.add(path)
        return missing

    def fetch(self, target: TextTarget) -> bool:
        """Bind a target's archive if there is a valid one by now; False if there is none."""
        if not target.on_disk:
            return all(text in self._entries for text in target.texts)
        for path in self._paths(target):
            facts = self.notes.facts_of(path)
            if facts is not None and self._is_valid(path, facts, target):
                self._bind(target, path, facts.fingerprint)
                return True
        return False

    def put(self, target: TextTarget, outputs: Sequence[TextOutputs]) -> None:
        """Keep the outputs of a target's texts, in their order: in memory, or in the archive that `find` chose.

        Raises ``WriteError``.
        """
        if not target.on_disk:
            kept = (one.to(self._memory_dtype) for one in outputs)
            self._entries.update(zip(target.texts, kept, strict=True))
            return
        arrays = {
            _member(name, number): array
            for number, one in enumerate(outputs)
            for name, array in self._layout.arrays(one).items()
        }
        path, fingerprint = self._write_paths[target], self._fingerprint(target)
        cache_files.write_archive(path, arrays, fingerprint)
        self._bind(target, path, fingerprint)

    def _bind(self, target: TextTarget, path: Path, fingerprint: Mapping[str, Any] | None) -> None:
        self._bound[target] = path
        for number, text in enumerate(target.texts):
            self._entries.setdefault(text, _Slot(path, number, fingerprint))

    def _read(self, slot: _Slot) -> TextOutputs:
        shapes = self._layout.shapes()
        names = [_member(name, slot.number) for name in shapes]
        extra = [cache_files.FINGERPRINT] if slot.fingerprint is not None else []
        try:
            arrays = cache_files.read_members(slot.path, [*names, *extra])
        except BrokenArchive as error:
            if error.is_damaged:
                slot.path.unlink(missing_ok=True)  # its directory looked right: the next start would believe it again
            raise UserError(f"{slot.path}: this text encoder cache is damaged; start again, it is made anew") from error
        found = arrays.pop(cache_files.FINGERPRINT, None)
        same = found is None or cache_files.parse_fingerprint(str(found)) == slot.fingerprint
        if not same or [array.shape for array in arrays.values()] != list(shapes.values()):
            raise UserError(f"{slot.path}: this text encoder cache was changed by another program; start again")
        return self._layout.outputs(list(arrays.values()))

    # ---- which archive is valid, which name is free

    def _fingerprint(self, target: TextTarget) -> dict[str, Any]:
        captions = _digest(target.texts)
        return {**self._maker, "format": _FORMAT, "image": Path(target.path).name, "captions": captions}

    def _paths(self, target: TextTarget) -> tuple[Path, Path]:
        """The primary archive beside the image, and the one used when that name is taken."""
        image = Path(target.path)
        tag = _digest((image.suffix, *target.texts))[:8]
        return image.with_name(image.stem + _SUFFIX), image.with_name(f"{image.stem}_{tag}{_SUFFIX}")

    def _is_valid(self, path: Path, facts: ArchiveFacts, target: TextTarget) -> bool:
        if facts.fingerprint is not None:
            members = (_member(name, number) for name in self._layout.shapes() for number in range(len(target.texts)))
            return facts.fingerprint == self._fingerprint(target) and facts.names.issuperset(members)
        if not self._is_of_stored_caption(facts, target) or not _is_newer(path, target):
            return False
        believed = self._is_by_our_encoders(path, target.stored)
        (self.notes.foreign if believed else self.notes.unlike).append(str(path))
        return believed

    def _is_by_our_encoders(self, path: Path, text: str) -> bool:
        if self._believes_others is None and self._encode is not None:
            try:
                found = self._read(_Slot(path, 0, None))
            except UserError:  # damaged: made again, and the next one answers
                return False
            self._believes_others = found.is_like(self._encode(text))
        return bool(self._believes_others)

    def _is_of_stored_caption(self, facts: ArchiveFacts, target: TextTarget) -> bool:
        """True for an archive of another program if this image is used with the caption that such programs encode."""
        fits = all(facts.shapes.get(name) == shape for name, shape in self._layout.shapes().items())
        return fits and target.texts == (target.stored,)

    def _choose_path(self, target: TextTarget, claimed: set[Path]) -> Path:
        primary, alternative = self._paths(target)
        return primary if primary not in claimed and self._may_overwrite(primary, target) else alternative

    def _may_overwrite(self, path: Path, target: TextTarget) -> bool:
        def is_outdated(facts: ArchiveFacts) -> bool:
            if facts.fingerprint is not None:
                return facts.fingerprint.get("image") == Path(target.path).name
            return self._is_of_stored_caption(facts, target)

        return self.notes.may_overwrite(path, is_outdated)


def _member(name: str, number: int) -> str:
    """Name of an array of variant ``number``: the reference's own for the first."""
    return name if number == 0 else f"{name}_variant{number}"


def _digest(texts: Sequence[str]) -> str:
    text = json.dumps(list(texts))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _is_newer(path: Path, target: TextTarget) -> bool:
    """True if the archive is not older than the image and the caption's file.

    Class tokens come from a folder's name, whose changes leave no date: what was made of them is not believed.
    """
    if target.caption_path is None:
        return False
    try:
        sources = [FileState.of(source).mtime_ns for source in (target.path, target.caption_path)]
        return FileState.of(str(path)).mtime_ns >= max(sources)
    except UnreadableImage:
        return False
