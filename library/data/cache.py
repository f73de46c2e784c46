"""The latent cache: one store for latents in memory and on disk.

A file on disk is believed only if its fingerprint says that it was made from this image file as it is now, by this
VAE, for this bucket, scale and crop. Files of other programs have no fingerprint: one of each folder is compared with
what this VAE gives, and answers for all. An archive lies beside the image: ``<stem>.npz`` in the reference's format,
or, if that name belongs to something else that is valid, ``<stem>_<W>x<H>_<tag>.npz``. So two data sets over one
folder and images of equal stem do not clash. Latents are kept as the VAE gives them: one sample of the posterior, not
multiplied by the family's scale.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from library.data import cache_files
from library.data.cache_files import ArchiveFacts, BrokenArchive, latent_shape
from library.data.images import RESIZE_VERSION, UnreadableImage, centred_cut
from library.data.records import Fit, ImageRecord, Size

_FORMAT = 1
_SAME_VAE = "vae_in_other_types"
# Latents that a metadata file names have the scale and cut that its author chose; the bucket says enough.
_PREPARED_FREELY = frozenset({"resized", "crop"})
_ALONE = _PREPARED_FREELY | {"image"}
# Averaged over few cells, latents of one VAE are close in any precision and in nearly the same cut; those of another
# latent space differ by about their own size.
_CELLS = 4
_ALIKE = 0.4

MeanEncoder = Callable[["LatentTarget"], torch.Tensor]
"""Mean of the posterior CHW of an image in its geometry, float32 on the CPU. Raises `UnreadableImage`."""


@dataclass(frozen=True, slots=True)
class LatentTarget:
    """One image in one geometry: what one cache entry holds.

    ``size`` is the image's own; ``npz_path`` an archive that a metadata file names for it.
    """

    path: str
    size: Size
    fit: Fit
    npz_path: str | None = None

    @property
    def is_alone(self) -> bool:
        """True for an archive that a metadata file names and that has no image beside it."""
        return self.path == self.npz_path


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells that a file was changed."""

    size_bytes: int
    mtime_ns: int

    @staticmethod
    def of(path: str) -> FileState:
        """State of a file now. Raises `UnreadableImage`."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise UnreadableImage(path, f"cannot be read ({error.strerror or error})") from error
        return FileState(status.st_size, status.st_mtime_ns)


def target_of(record: ImageRecord, fit: Fit) -> LatentTarget:
    """The cache entry that serves a record of a data set."""
    return LatentTarget(record.path, record.size, fit, record.npz_path)


@dataclass
class StoreNotes:
    """What was noticed while looking for archives; lists hold file names.

    ``foreign``: used although they carry no fingerprint (written by another program). ``broken``: unreadable.
    ``unlike``: without a fingerprint, and not used since the run's own models give something else.
    ``stale``: made for the same purpose from an older state of the image, or without the mirrored latents.
    """

    foreign: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    def facts_of(self, path: Path) -> ArchiveFacts | None:
        """Facts about an archive; None if there is none, or a broken one, which is noted."""
        try:
            return cache_files.read_facts(path)
        except BrokenArchive:
            if str(path) not in self.broken:
                self.broken.append(str(path))
            return None

    def may_overwrite(self, path: Path, is_outdated: Callable[[ArchiveFacts], bool]) -> bool:
        """True if nothing of use is lost: no whole archive is there, or an older one of the same purpose, which is
        noted.
        """
        facts = self.facts_of(path)
        if facts is None:
            return True
        if not is_outdated(facts):
            return False
        self.stale.append(str(path))
        return True


@dataclass(frozen=True, slots=True)
class _Entry:
    latents_CHW: torch.Tensor
    flipped_CHW: torch.Tensor | None


class LatentStore:
    """Latents by `LatentTarget`, in memory or in archives beside the images.

    ``family`` names the latent space ("sd", "sdxl"), ``vae`` is a hash of the VAE's weights: both are in the
    fingerprint. ``memory_dtype`` is the type of latents kept in memory. ``same_vae`` gives hashes of the same weights
    in other number types, with which the archives serve too; it is asked when the first archive is written.
    ``takes_over``: the primary name is written in any case, also over latents of another purpose.
    """

    def __init__(
        self,
        family: str,
        vae: str,
        *,
        to_disk: bool = False,
        memory_dtype: torch.dtype = torch.float32,
        same_vae: Callable[[], Sequence[str]] = tuple,
        takes_over: bool = False,
    ) -> None:
        self.to_disk = to_disk
        self._same_vae = functools.cache(same_vae)
        self._takes_over = takes_over
        self.notes = StoreNotes()
        self._maker = {"family": family, "vae": vae, "resize": RESIZE_VERSION}
        self._memory_dtype = memory_dtype
        self._entries: dict[LatentTarget, _Entry | Path] = {}
        self._write_paths: dict[LatentTarget, Path] = {}
        self._believes: dict[Path, bool] = {}  # by folder: were archives of other programs made by this VAE?

    def __contains__(self, target: LatentTarget) -> bool:
        return target in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def in_memory(self, target: LatentTarget) -> bool:
        """True if the target's latents are kept in memory."""
        return isinstance(self._entries.get(target), _Entry)

    def load(self, target: LatentTarget, flipped: bool) -> torch.Tensor:
        """Latents CHW of a target in the store; float32 from disk. Raises `UnreadableImage` for a broken archive."""
        entry = self._entries[target]
        if isinstance(entry, _Entry):
            latents = entry.flipped_CHW if flipped else entry.latents_CHW
            if latents is None:
                raise KeyError(f"{target.path}: no mirrored latents were made")
            return latents
        try:
            array = cache_files.read_array(entry, cache_files.LATENTS_FLIPPED if flipped else cache_files.LATENTS)
        except BrokenArchive as error:
            if error.is_damaged:
                entry.unlink(missing_ok=True)  # its directory looked right: the next start would believe it again
            raise UnreadableImage(str(entry), "this latent cache is damaged; start again, it is made anew") from error
        if array.shape != latent_shape(target.fit.bucket):
            raise UnreadableImage(str(entry), "this latent cache was changed by another program; start again")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    def find(
        self, targets: Sequence[LatentTarget], flips: Sequence[bool], encode: MeanEncoder | None = None
    ) -> list[int]:
        """Bind the valid archives of targets and return the positions of those that have none.

        ``encode`` is the run's VAE: of each folder the first archive without a fingerprint that fits otherwise is
        compared with what it gives, and answers for all (without it they serve only where no image is). For a store
        on disk it also fixes where each missing one will be written, the same in every process that asks before
        anything was written.
        """
        missing: list[int] = []
        claimed: set[Path] = set()
        for position, (target, flipped) in enumerate(zip(targets, flips, strict=True)):
            if target in self._entries:
                continue
            path = self._find_one(target, flipped, encode)
            if path is None:
                missing.append(position)
            else:
                self._entries[target] = path
                claimed.add(path)
        if self.to_disk:
            for position in missing:
                path = self._choose_path(targets[position], claimed)
                claimed.add(path)
                self._write_paths[targets[position]] = path
        return missing

    def put(
        self, target: LatentTarget, state: FileState, latents_CHW: torch.Tensor, flipped_CHW: torch.Tensor | None
    ) -> None:
        """Keep new latents: in memory, or in the archive that `find` chose. Raises ``WriteError``.

        ``state`` is the image file's from before it was decoded, so that an image edited meanwhile is noticed next
        time.
        """
        if not self.to_disk:
            kept = [None if one is None else self._compact(one) for one in (latents_CHW, flipped_CHW)]
            assert kept[0] is not None
            self._entries[target] = _Entry(kept[0], kept[1])
            return
        path = self._write_paths[target]
        arrays: dict[str, Any] = {
            cache_files.LATENTS: latents_CHW.float().numpy(),
            cache_files.ORIGINAL_SIZE: np.array(target.size),
            cache_files.CROP_LTRB: np.array(target.fit.crop_ltrb, dtype=np.float64),
        }
        if flipped_CHW is not None:
            arrays[cache_files.LATENTS_FLIPPED] = flipped_CHW.float().numpy()
        others = self._same_vae()
        fingerprint = {**self._fingerprint(target, state), **({_SAME_VAE: list(others)} if others else {})}
        cache_files.write_archive(path, arrays, fingerprint)
        self._entries[target] = path

    def fetch(self, target: LatentTarget, flipped: bool) -> bool:
        """Bind an archive that another process has written meanwhile; False if there is none."""
        path = self._find_one(target, flipped, None)
        if path is not None:
            self._entries[target] = path
        return path is not None

    def _compact(self, latents: torch.Tensor) -> torch.Tensor:
        kept = latents.detach().to(self._memory_dtype)
        return kept.clone(memory_format=torch.contiguous_format)  # not a view of a batch

    # ---- which archive is valid, which name is free

    def _purpose(self, target: LatentTarget) -> dict[str, Any]:
        """What an archive is for: all of the fingerprint that is not the state of the image file."""
        return {
            **self._maker,
            "format": _FORMAT,
            "bucket": list(target.fit.bucket),
            "resized": list(target.fit.resized),
            "crop": list(centred_cut(target.fit).left_top),
            "image": Path(target.path).name,
        }

    def _fingerprint(self, target: LatentTarget, state: FileState) -> dict[str, Any]:
        return {**self._purpose(target), "image_bytes": state.size_bytes, "image_mtime_ns": state.mtime_ns}

    def _paths(self, target: LatentTarget) -> tuple[Path, Path]:
        """The primary archive beside the image, and the one used when that name is taken."""
        image = Path(target.path)
        purpose = self._purpose(target)
        purpose["image"] = image.suffix
        tag = hashlib.blake2b(json.dumps(purpose, sort_keys=True).encode(), digest_size=4).hexdigest()
        width, height = target.fit.bucket
        return image.with_suffix(".npz"), image.with_name(f"{image.stem}_{width}x{height}_{tag}.npz")

    def _find_one(self, target: LatentTarget, flipped: bool, encode: MeanEncoder | None) -> Path | None:
        if target.npz_path is not None and self._is_prepared(Path(target.npz_path), target, flipped, encode):
            return Path(target.npz_path)
        if not self.to_disk:
            return None
        others: list[tuple[Path, ArchiveFacts]] = []
        for path in self._paths(target):
            facts = self.notes.facts_of(path)
            if facts is None:
                continue
            if facts.fingerprint is None:
                others.append((path, facts))
            elif self._is_valid(path, facts, target, flipped, encode):
                return path
        return next((path for path, facts in others if self._is_valid(path, facts, target, flipped, encode)), None)

    def _is_prepared(self, path: Path, target: LatentTarget, flipped: bool, encode: MeanEncoder | None) -> bool:
        """True for an archive that the metadata names, if it fits; the image itself may be absent."""
        facts = self.notes.facts_of(path)
        if facts is None:
            return False
        if not os.path.exists(target.path) or target.is_alone:
            return facts.fits(target.fit.bucket, flipped) or self._is_own(facts, target, flipped, _ALONE)
        return self._is_valid(path, facts, target, flipped, encode, _PREPARED_FREELY)

    def _is_valid(
        self,
        path: Path,
        facts: ArchiveFacts,
        target: LatentTarget,
        flipped: bool,
        encode: MeanEncoder | None,
        free: frozenset[str] = frozenset(),
    ) -> bool:
        try:
            state = FileState.of(target.path)
        except UnreadableImage:
            return False
        if facts.fingerprint is not None:
            return facts.is_complete(flipped) and _agree(facts.fingerprint, self._fingerprint(target, state), free)
        if not facts.fits(target.fit.bucket, flipped):
            return False
        if facts.original_size != target.size or FileState.of(str(path)).mtime_ns < state.mtime_ns:
            return False
        believed = self._is_by_our_vae(path, target, encode)
        (self.notes.foreign if believed else self.notes.unlike).append(str(path))
        return believed

    def _is_by_our_vae(self, path: Path, target: LatentTarget, encode: MeanEncoder | None) -> bool:
        """What the first archive of the folder tells; False if there is none that could be compared."""
        if path.parent not in self._believes and encode is not None:
            try:
                found = torch.from_numpy(cache_files.read_array(path, cache_files.LATENTS)).float()
                self._believes[path.parent] = _are_alike(found, encode(target))
            except (BrokenArchive, UnreadableImage):  # made again, or reported then; the next one answers
                return False
        return self._believes.get(path.parent, False)

    def _is_own(
        self, facts: ArchiveFacts, target: LatentTarget, flipped: bool, free: frozenset[str] = frozenset()
    ) -> bool:
        """True if the archive was made by us for this purpose, whatever the image's state was."""
        if facts.fingerprint is None or not facts.is_complete(flipped):
            return False
        purpose = self._purpose(target)
        state = {name: value for name, value in facts.fingerprint.items() if name not in purpose}
        return _agree(facts.fingerprint, {**purpose, **state}, free)

    def _choose_path(self, target: LatentTarget, claimed: set[Path]) -> Path:
        primary, alternative = self._paths(target)
        free = primary not in claimed and (self._may_overwrite(primary, target) or self._takes_over)
        return primary if free else alternative

    def _may_overwrite(self, path: Path, target: LatentTarget) -> bool:
        def is_outdated(facts: ArchiveFacts) -> bool:
            if facts.fingerprint is not None:
                return self._is_own(facts, target, flipped=False)
            if str(path) in self.notes.unlike:
                return False  # of use to whoever made it
            return facts.fits(target.fit.bucket, flipped=False) and facts.original_size in (target.size, None)

        return self.notes.may_overwrite(path, is_outdated)


def _agree(found: dict[str, Any], wanted: dict[str, Any], free: frozenset[str]) -> bool:
    """True if two fingerprints tell the same, but for the names in ``free`` and the VAE's number type."""
    same_vae = wanted["vae"] in (found.get("vae"), *found.get(_SAME_VAE, ()))
    passed_over = {"vae", _SAME_VAE, *free}
    names = (found.keys() | wanted.keys()) - passed_over
    return same_vae and all(name in found and name in wanted and found[name] == wanted[name] for name in names)


def _are_alike(found_CHW: torch.Tensor, wanted_CHW: torch.Tensor) -> bool:
    """True if two latents of an image are of one VAE, by their means over a few cells of the picture."""
    found, wanted = (nn.functional.adaptive_avg_pool2d(one, _CELLS) for one in (found_CHW, wanted_CHW))
    return bool((found - wanted).norm() <= _ALIKE * wanted.norm())


def describe_notes(notes: StoreNotes, what: str = "latent", maker: str = "another VAE") -> list[str]:
    """One line for each kind of thing that the user should know about the archives found.

    ``what`` is kept in them, ``maker`` is what may have made those that do not say so.
    """
    lines: list[str] = []
    counts = Counter(notes.foreign)
    if counts:
        lines.append(
            f"{len(counts)} {what} archives without a fingerprint were used (written by another program, first: "
            f"{next(iter(counts))}); delete them if they were made with {maker}"
        )
    if notes.broken:
        lines.append(
            f"{len(notes.broken)} {what} archives were unreadable and are made again (first: {notes.broken[0]})"
        )
    if notes.unlike:
        lines.append(
            f"{len(notes.unlike)} {what} archives of another program are not used: they hold something else than this"
            f" model gives (first: {notes.unlike[0]})"
        )
    stale = [path for path in notes.stale if path not in notes.unlike]
    if stale:
        lines.append(f"{len(stale)} {what} archives were out of date and are made again (first: {stale[0]})")
    return lines
