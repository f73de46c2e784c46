"""Latents made ahead: each image goes through the VAE once.

B images of a group, H W pixel height and width, h w latent height and width (an eighth).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoint.hashes import fingerprints_in
from library.data.cache import FileState, LatentStore, LatentTarget, describe_notes, target_of
from library.data.images import UnreadableImage, fit_pixels, read_image, to_model_range
from library.data.loader import prefetch
from library.data.records import ImageProblem, OnBad, ResolvedDataset
from library.data.spec_checks import uncacheable_subsets
from library.log import UserError, progress
from library.rng import torch_stream

logger = logging.getLogger(__name__)
_ALONE = "there is no image beside these latents, and they"
_UNFIT = f"{_ALONE} do not fit: they are damaged, of another size or VAE, or lack the mirror image"
_NOT_ALL = f"{_ALONE} are not used: those of other images do not fit, so pixels are; --cache_latents makes the others"
_NEVER_FINITE = "its latents are not finite, not even in float32; check the VAE file"

# Archives hold finite float32 numbers, so the type of the VAE that made them is only a matter of digits: those of
# float32 serve all types, those of one half precision serve the other, but not a run that wants float32.
_SERVED_TYPES = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float16: (torch.bfloat16,),
    torch.bfloat16: (torch.float16,),
}
_POSTERIOR_SEED = 0  # latents do not depend on a run's seed: runs share the files


def _no_wait() -> None:
    """One process has nobody to wait for."""


@dataclass(frozen=True, slots=True)
class WorkShare:
    """This process's part of the work: ``rank`` of ``count``; ``wait`` returns when all processes have called it."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = _no_wait


@dataclass
class CachingReport:
    """What caching did in this process; ``problems`` are the images left out, in all processes alike."""

    total: int = 0
    reused: int = 0
    encoded: int = 0
    float32_retries: list[str] = field(default_factory=list)
    problems: tuple[ImageProblem, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Item:
    """An image to encode, and whether its mirror image is wanted too."""

    target: LatentTarget
    flipped: bool


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Pixels of a group; images that could not be decoded are in ``problems``."""

    items: tuple[_Item, ...]
    states: tuple[FileState, ...]
    pixels_BHWC: Tensor | None
    problems: tuple[ImageProblem, ...]
    size: int


def _warn_of_face_crops(datasets: Sequence[ResolvedDataset]) -> None:
    for subset in (subset for dataset in datasets for subset in dataset.spec.subsets):
        if subset.augmentation.face_crop_aug_range is not None:
            logger.warning("%s: face_crop_aug_range has no effect on cached latents (centred cuts)", subset.name)


def fingerprints_served(load_vae: Callable[[], nn.Module], dtype: torch.dtype) -> list[str]:
    """What the archives of a VAE that runs in ``dtype`` serve beside it; ``load_vae`` gives it in float32."""
    return list(fingerprints_in(load_vae(), _SERVED_TYPES[dtype]).values())


def bind_prepared_latents(
    datasets: Sequence[ResolvedDataset], store: LatentStore, vae: Any, *, device: torch.device, dtype: torch.dtype
) -> int:
    """Use archives that a metadata file names (latents prepared ahead); returns how many are bound.

    ``vae`` is only asked whether archives of other programs are its own, see `LatentStore.find`. A data set one of
    whose images lacks a valid archive, or whose augmentation changes pixels, stays with pixels
    (`library.data.dataset.TrainImages` asks for all).
    """
    before, encode = len(store), _MeanOfVae(vae, device, dtype)
    for dataset in datasets:
        if uncacheable_subsets([dataset.spec]) or not all(record.npz_path for record in dataset.records):
            continue
        items = _unique_items([dataset])
        unfit = store.find([item.target for item in items], [item.flipped for item in items], encode)
        if unfit:
            logger.warning(
                "prepared latents of %d images are not used: made for another size, without mirror image, by another"
                " VAE, or older than the image (first: %s); --cache_latents_to_disk makes them anew",
                len(unfit),
                items[unfit[0]].target.npz_path,
            )
    return len(store) - before


def leave_out_lone_latents(
    datasets: Sequence[ResolvedDataset], store: LatentStore, on_bad_image: OnBad
) -> tuple[ResolvedDataset, ...]:
    """The data sets without prepared latents that have no image beside them and cannot be used.

    It is for runs that make no latents: there a data set gives latents of all its images, or pixels. Raises UserError
    that lists them all, unless ``on_bad_image`` is "skip".
    """
    problems: dict[str, ImageProblem] = {}
    for dataset in datasets:
        targets = [target_of(record, fit) for record, fit in zip(dataset.records, dataset.fits, strict=True)]
        by_pixels = any(target not in store and not target.is_alone for target in targets)
        for target in targets:
            if target.is_alone and (by_pixels or target not in store):
                problems[target.path] = ImageProblem(target.path, _NOT_ALL if target in store else _UNFIT)
    return _without_problems(datasets, tuple(problems.values()), on_bad_image)


def cache_latents(
    datasets: Sequence[ResolvedDataset],
    vae: Any,
    store: LatentStore,
    *,
    vae_batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    workers: int = 4,
    share: WorkShare | None = None,
    on_bad_image: OnBad = "error",
    after_group: Callable[[], None] | None = None,
) -> tuple[tuple[ResolvedDataset, ...], CachingReport]:
    """Make all latents that ``store`` lacks; returns the data sets without unusable images, and a report.

    ``vae``: diffusers AutoencoderKL; it is moved to ``device`` in ``dtype`` and left there. Latents are one posterior
    sample, drawn from a stream of the image's name, so they are the same in each run; they are not scaled. Groups
    hold images of one bucket, at most ``vae_batch_size``; ``workers`` threads decode ahead. On disk the groups are
    dealt out over the processes, in memory each process makes all. Latents that are not finite are made again in
    float32. ``after_group`` (to empty a device's cache) is called after the groups of each size, not after each group,
    as that would cost more than small images take.

    Augmentations that forbid caching (`uncacheable_subsets`) have been refused before. Raises UserError: images that
    cannot be used, all in one list, unless ``on_bad_image`` is "skip"; folders that cannot be written.
    """
    _warn_of_face_crops(datasets)
    share = share or WorkShare()
    items = _unique_items(datasets)
    targets, flips = [item.target for item in items], [item.flipped for item in items]
    missing = [items[index] for index in store.find(targets, flips, _MeanOfVae(vae, device, dtype))]
    if store.to_disk:
        share.wait()  # nobody writes before all have looked
    report = CachingReport(total=len(items), reused=len(items) - len(missing), notes=tuple(describe_notes(store.notes)))
    for note in report.notes:
        logger.warning("%s", note)
    groups = _groups(missing, vae_batch_size)
    mine = groups[share.rank :: share.count] if store.to_disk else groups
    problems = _Encoder(vae, store, device, dtype, workers, after_group, report).run(mine)
    if store.to_disk:
        share.wait()
        problems += _fetch_from_others(missing, store, problems)
    report.problems = tuple(sorted(problems, key=lambda problem: problem.path))
    return _without_problems(datasets, report.problems, on_bad_image), report


@dataclass(frozen=True)
class _MeanOfVae:
    """The run's VAE, asked for the mean of an image's posterior, to tell whose archives were found.

    A VAE that was asked is left on ``device`` in ``dtype``.
    """

    vae: Any
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, target: LatentTarget) -> Tensor:
        """The mean CHW, float32 on the CPU. Raises `UnreadableImage`."""
        pixels_HWC = fit_pixels(read_image(target.path), target.fit).pixels_HWC
        images_BCHW = to_model_range(torch.from_numpy(pixels_HWC).unsqueeze(0).to(self.device))
        mean_CHW = self._encode(images_BCHW, self.dtype)
        if not mean_CHW.isfinite().all():
            mean_CHW = self._encode(images_BCHW, torch.float32)
            _move(self.vae, self.device, self.dtype)
        return mean_CHW

    def _encode(self, images_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
        _move(self.vae, self.device, dtype)
        return self.vae.encode(images_BCHW.to(dtype)).latent_dist.mean[0].float().cpu()


def _move(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    nn.Module.to(vae, device=device, dtype=dtype)  # diffusers' own `to` prints a notice each time
    vae.eval()


def _unique_items(datasets: Sequence[ResolvedDataset]) -> list[_Item]:
    """Each image in each geometry once, mirrored if any of its subsets asks for it, sorted by bucket."""
    flips: dict[LatentTarget, bool] = {}
    for dataset in datasets:
        for record, fit in zip(dataset.records, dataset.fits, strict=True):
            target = target_of(record, fit)
            flips[target] = flips.get(target, False) or dataset.subset_of(record).augmentation.flip_aug
    order = sorted(flips, key=lambda target: (target.fit.bucket, target.path, target.fit.resized))
    return [_Item(target, flips[target]) for target in order]


def _groups(items: Sequence[_Item], size: int) -> list[tuple[_Item, ...]]:
    groups: list[list[_Item]] = []
    for item in items:
        if groups and len(groups[-1]) < size and groups[-1][0].target.fit.bucket == item.target.fit.bucket:
            groups[-1].append(item)
        else:
            groups.append([item])
    return [tuple(group) for group in groups]


def _decode(group: tuple[_Item, ...]) -> _Decoded:
    items: list[_Item] = []
    states: list[FileState] = []
    pixels: list[Tensor] = []
    problems: list[ImageProblem] = []
    for item in group:
        target = item.target
        if target.is_alone:
            problems.append(ImageProblem(target.path, _UNFIT))
            continue
        try:
            state = FileState.of(target.path)
            image_HWC = read_image(target.path)
            if (image_HWC.shape[1], image_HWC.shape[0]) != target.size:
                raise UnreadableImage(target.path, "its size changed while the program ran")
        except UnreadableImage as error:
            problems.append(ImageProblem(error.path, error.reason))
            continue
        items.append(item)
        states.append(state)
        pixels.append(torch.from_numpy(fit_pixels(image_HWC, target.fit).pixels_HWC))
    return _Decoded(tuple(items), tuple(states), torch.stack(pixels) if pixels else None, tuple(problems), len(group))


class _Encoder:
    """The VAE's side of caching: decode ahead, encode, sample, store behind."""

    def __init__(
        self,
        vae: Any,
        store: LatentStore,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        after_group: Callable[[], None] | None,
        report: CachingReport,
    ) -> None:
        self._vae = vae
        self._store = store
        self._device = device
        self._dtype = dtype
        self._workers = workers
        self._after_group = after_group
        self._report = report
        self._writing: Future[None] | None = None

    def run(self, groups: Sequence[tuple[_Item, ...]]) -> list[ImageProblem]:
        """Encode groups; what is not finite once more, alone, in float32. Returns the images that failed."""
        if not groups:
            return []
        problems: list[ImageProblem] = []
        with torch.no_grad(), ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            not_finite = self._encode_all(groups, self._dtype, "caching latents", writer, problems)
            if not_finite:
                self._report.float32_retries += [item.target.path for item in not_finite]
                logger.warning(
                    "latents of %d images were not finite in %s and are made again in float32: %s",
                    len(not_finite),
                    self._dtype,
                    ", ".join(Path(item.target.path).name for item in not_finite),
                )
                alone = [(item,) for item in not_finite]
                hopeless = self._encode_all(alone, torch.float32, "caching latents in float32", writer, problems)
                problems += [ImageProblem(item.target.path, _NEVER_FINITE) for item in hopeless]
                _move(self._vae, self._device, self._dtype)
            self._wait_for_writing()
        return problems

    def _encode_all(
        self,
        groups: Sequence[tuple[_Item, ...]],
        dtype: torch.dtype,
        description: str,
        writer: ThreadPoolExecutor,
        problems: list[ImageProblem],
    ) -> list[_Item]:
        """Encode groups in one precision; returns the items whose latents are not finite."""
        _move(self._vae, self._device, dtype)
        not_finite: list[_Item] = []
        last_size: torch.Size | None = None
        decoded_groups = closing(prefetch(groups, _decode, self._workers))  # an interrupt drops what is not begun
        with decoded_groups as source, progress(sum(len(group) for group in groups), description) as bar:
            for decoded in source:
                problems += decoded.problems
                if decoded.pixels_BHWC is not None:
                    if self._after_group and last_size and last_size != decoded.pixels_BHWC.shape[1:3]:
                        self._after_group()
                    last_size = decoded.pixels_BHWC.shape[1:3]
                    latents = self._encode_group(decoded, decoded.pixels_BHWC, dtype)
                    not_finite += [item for item, one in zip(decoded.items, latents, strict=True) if one is None]
                    self._wait_for_writing()  # at most one group is in the making, one on its way to the disk
                    self._writing = writer.submit(self._put_group, decoded, latents)
                bar.advance(decoded.size, images=decoded.size)
        if self._after_group is not None:
            self._after_group()
        return not_finite

    def _encode_group(
        self, decoded: _Decoded, pixels_BHWC: Tensor, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor | None] | None]:
        """Latents Chw and mirrored ones per image, float32 on the CPU; None where they are not finite."""
        images_BCHW = to_model_range(pixels_BHWC.to(self._device)).to(dtype)
        names = [Path(item.target.path).name for item in decoded.items]
        latents = self._sample(images_BCHW, names, "straight")
        mirrored: dict[int, Tensor] = {}
        chosen = [index for index, item in enumerate(decoded.items) if item.flipped]
        if chosen:
            flipped_BCHW = images_BCHW[chosen].flip(-1)
            flipped = self._sample(flipped_BCHW, [names[index] for index in chosen], "mirrored")
            mirrored = dict(zip(chosen, flipped, strict=True))
        results: list[tuple[Tensor, Tensor | None] | None] = []
        for index, straight in enumerate(latents):
            mirror = mirrored.get(index)
            finite = bool(straight.isfinite().all()) and (mirror is None or bool(mirror.isfinite().all()))
            results.append((straight, mirror) if finite else None)
        return results

    def _sample(self, images_BCHW: Tensor, names: Sequence[str], variant: str) -> Tensor:
        """One draw of each image's posterior: mean + deviation * noise, the noise from a stream of the image's name."""
        posterior = self._vae.encode(images_BCHW).latent_dist
        mean, deviation = posterior.mean.float().cpu(), posterior.std.float().cpu()
        shape = mean.shape[1:]
        noise = [
            torch.randn(shape, generator=torch_stream(_POSTERIOR_SEED, "posterior", name, variant)) for name in names
        ]
        return mean + deviation * torch.stack(noise)

    def _put_group(self, decoded: _Decoded, latents: Sequence[tuple[Tensor, Tensor | None] | None]) -> None:
        for item, state, one in zip(decoded.items, decoded.states, latents, strict=True):
            if one is not None:
                self._store.put(item.target, state, one[0], one[1])
                self._report.encoded += 1

    def _wait_for_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _fetch_from_others(
    missing: Sequence[_Item], store: LatentStore, own_problems: Sequence[ImageProblem]
) -> list[ImageProblem]:
    """Bind what other processes wrote. What nobody wrote is a problem; its reason is found by decoding it here too."""
    known = {problem.path for problem in own_problems}
    problems: list[ImageProblem] = []
    for item in missing:
        if item.target in store or item.target.path in known or store.fetch(item.target, item.flipped):
            continue
        found = _decode((item,)).problems
        problems += found or (ImageProblem(item.target.path, "its latents could not be made"),)
    return problems


def _without_problems(
    datasets: Sequence[ResolvedDataset], problems: Sequence[ImageProblem], on_bad_image: OnBad
) -> tuple[ResolvedDataset, ...]:
    """The data sets without the images in ``problems``; UserError listing them if they are not to be skipped."""
    if not problems:
        return tuple(datasets)
    lines = [f"{problem.path}: {problem.reason}" for problem in problems]
    if on_bad_image == "error":
        raise UserError.of([*lines, "mend or remove these images, or give --on_bad_image skip to go on without them"])
    for line in lines:
        logger.warning("%s; it is left out", line)
    bad = {problem.path for problem in problems}
    left: list[ResolvedDataset] = []
    for dataset in datasets:
        kept = [index for index, record in enumerate(dataset.records) if record.path not in bad]
        more = tuple(problem for problem in problems if any(record.path == problem.path for record in dataset.records))
        left.append(
            replace(
                dataset,
                records=tuple(dataset.records[index] for index in kept),
                fits=tuple(dataset.fits[index] for index in kept),
                problems=dataset.problems + more,
            )
        )
    if not any(dataset.has_training_images for dataset in left):
        raise UserError("no image is left to train on: none of the data sets' images can be used")
    return tuple(left)
