"""Batches: from a place in the epoch's plan to tensors and captions.

B samples, C channels, H W pixel height and width (of latents: an eighth). What a sample becomes is a function of
the run's seed, the epoch, the image and the repeat alone; `load` may be called from any thread, in any order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from library.data.cache import LatentStore, target_of
from library.data.cache_files import latent_shape
from library.data.caption_variants import choose_caption
from library.data.face_names import face_box
from library.data.images import (
    Cut,
    UnreadableImage,
    centred_cut,
    fit_alike,
    fit_pixels,
    is_mirrored,
    opaque,
    read_image,
    read_pixels,
    to_model_range,
)
from library.data.masks import Masks, has_mask
from library.data.records import (
    Batch,
    CaptionClock,
    DatasetSpec,
    Fit,
    ImageRecord,
    MicroBatch,
    OnBad,
    ResolvedDataset,
    Sample,
    Size,
    SubsetSpec,
)
from library.log import UserError
from library.rng import seed_of, stream

logger = logging.getLogger(__name__)


class BadImage(UserError):
    """An image that was found to be unusable only when its turn came, and must not be skipped."""


class NoImageLeft(UserError):
    """A batch of which no image can be used, nor any other of its bucket in its place."""


@dataclass(frozen=True, slots=True)
class _Visit:
    """One visit of an image. ``data``: uint8 HWC pixels or latents CHW. ``conditioning_HWC``: uint8 pixels of the
    picture beside it. ``mask_hw``: what each latent counts in the loss, in 255ths (uint8); None if all count 1.
    """

    record: ImageRecord
    seed: int
    data: torch.Tensor
    cut: Cut
    mask_hw: torch.Tensor | None = None
    conditioning_HWC: torch.Tensor | None = None


class TrainImages:
    """The images of a run, given out as batches.

    ``store``: latents made before; a data set all of whose images are in it gives latents, any other gives pixels.
    ``on_bad_image``: an image that cannot be decoded stops the run ("error"), or its place is taken by another
    image of the same batch that does not count ("skip"); ``bad_images`` then maps its path to the reason.
    ``caption_variants``: forms prepared of each caption that varies, of which a visit takes one; 0: any form.
    """

    def __init__(
        self,
        datasets: Sequence[ResolvedDataset],
        store: LatentStore | None,
        seed: int,
        on_bad_image: OnBad = "error",
        caption_variants: int = 0,
    ) -> None:
        self.datasets = tuple(datasets)
        self.bad_images: dict[str, str] = {}
        self._store = store
        self._seed = seed
        self._on_bad_image = on_bad_image
        self._caption_variants = caption_variants
        self._lock = threading.Lock()
        self._masks = Masks()
        self._gives_latents = tuple(
            store is not None
            and all(target_of(record, fit) in store for record, fit in zip(dataset.records, dataset.fits, strict=True))
            for dataset in self.datasets
        )

    def gives_latents(self, dataset: int) -> bool:
        """True if batches of this data set hold latents, False if pixels."""
        return self._gives_latents[dataset]

    def in_memory(self, dataset: int) -> bool:
        """True if batches of this data set are made without reading any file."""
        resolved, store = self.datasets[dataset], self._store
        if store is None or not self._gives_latents[dataset]:
            return False
        pairs = zip(resolved.records, resolved.fits, strict=True)
        return all(
            record.conditioning_path is None
            and not has_mask(record, resolved.subset_of(record))
            and store.in_memory(target_of(record, fit))
            for record, fit in pairs
        )

    def path_of(self, key: str) -> str:
        """The file of an image by its key; the key itself if there is none such. For messages: it searches."""
        records = (record for dataset in self.datasets for record in dataset.records)
        return next((record.path for record in records if record.key == key), key)

    def load(self, micro: MicroBatch, rank: int, processes: int, clock: CaptionClock) -> Batch:
        """This process's share of a micro batch. Raises UserError for an image that cannot be used (see the class), in
        particular `NoImageLeft`.
        """
        spec = self.datasets[micro.dataset].spec
        samples, counts = micro.share(rank, processes)
        loaded = [self._load_or_none(micro.dataset, sample, clock.epoch) for sample in samples]
        weights = [_loss_weight(visit, spec) if visit and counts else 0.0 for visit in loaded]
        visits = [visit for visit in loaded if visit]
        if len(visits) < len(loaded):
            filler = visits[0] if visits else self._any_of(micro, clock.epoch)
            visits = [visit or filler for visit in loaded]
        return self._assemble(micro.dataset, visits, weights, clock)

    def _load_or_none(self, dataset: int, sample: Sample, epoch: int) -> _Visit | None:
        """The visit of a sample; None if the image is bad and may be skipped."""
        try:
            return self._visit(dataset, sample, epoch)
        except UnreadableImage as error:
            if self._on_bad_image == "error":
                raise BadImage(
                    f"{error.path}: {error.reason}; mend or remove the file, or give --on_bad_image skip"
                ) from error
            with self._lock:
                is_new = error.path not in self.bad_images
                self.bad_images[error.path] = error.reason
            if is_new:
                logger.warning("%s: %s; it is left out", error.path, error.reason)
            return None

    def _any_of(self, micro: MicroBatch, epoch: int) -> _Visit:
        """A visit of a sample that can be loaded, from the other processes' share or else from the whole bucket."""
        dataset = self.datasets[micro.dataset]
        bucket = dataset.fits[micro.samples[0].record].bucket
        rest = (Sample(index, 0) for index, fit in enumerate(dataset.fits) if fit.bucket == bucket)
        for sample in (*micro.samples, *rest):
            visit = self._load_or_none(micro.dataset, sample, epoch)
            if visit is not None:
                return visit
        width, height = bucket
        raise NoImageLeft(
            f"{dataset.records[micro.samples[0].record].path}: no image of bucket {width}x{height} can be decoded"
        )

    def _visit(self, dataset: int, sample: Sample, epoch: int) -> _Visit:
        resolved = self.datasets[dataset]
        record, fit = resolved.records[sample.record], resolved.fits[sample.record]
        subset = resolved.subset_of(record)
        seed = seed_of(self._seed, "sample", epoch, record.key, sample.repeat)  # all draws of the visit come from it
        if self._gives_latents[dataset]:
            visit = self._latents(record, fit, subset, seed)
        else:
            visit = self._pixels(record, fit, subset, seed)
        if record.conditioning_path is None:
            return visit
        guide_HWC = read_image(record.conditioning_path)
        return replace(visit, conditioning_HWC=torch.from_numpy(fit_alike(guide_HWC, visit.cut)))

    def _pixels(self, record: ImageRecord, fit: Fit, subset: SubsetSpec, seed: int) -> _Visit:
        pixels_HWC = read_pixels(record.path)
        image_HWC = opaque(pixels_HWC)
        if (image_HWC.shape[1], image_HWC.shape[0]) != record.size:
            raise UnreadableImage(record.path, "its size changed while the program ran")
        rules = subset.augmentation
        face = face_box(record.path) if rules.face_crop_aug_range is not None else None
        fitted = fit_pixels(image_HWC, fit, rules, seed, face)
        mask_hw = self._masks.read(record, subset, fitted.cut, pixels_HWC)
        return _Visit(record, seed, torch.from_numpy(fitted.pixels_HWC), fitted.cut, mask_hw)

    def _latents(self, record: ImageRecord, fit: Fit, subset: SubsetSpec, seed: int) -> _Visit:
        assert self._store is not None
        cut = centred_cut(fit)
        if is_mirrored(subset.augmentation, seed):
            cut = cut.mirrored()
        latents_CHW = self._store.load(target_of(record, fit), cut.flipped)
        return _Visit(record, seed, latents_CHW, cut, self._masks.kept(record, subset, cut))

    def _assemble(self, dataset: int, visits: Sequence[_Visit], weights: Sequence[float], clock: CaptionClock) -> Batch:
        resolved = self.datasets[dataset]
        captions = [
            choose_caption(
                visit.record,
                resolved.subset_of(visit.record).captions,
                clock,
                stream(visit.seed, "caption"),
                self._caption_variants,
            )
            for visit in visits
        ]
        data = torch.stack([visit.data for visit in visits])
        guides = [visit.conditioning_HWC for visit in visits if visit.conditioning_HWC is not None]
        latents = self._gives_latents[dataset]
        bucket = visits[0].cut.bucket
        return Batch(
            keys=tuple(visit.record.key for visit in visits),
            seeds=tuple(visit.seed for visit in visits),
            captions=tuple(captions),
            loss_weights_B=torch.tensor(weights, dtype=torch.float32),
            original_sizes_hw_B2=torch.tensor([visit.record.size[::-1] for visit in visits]),
            crop_top_lefts_B2=torch.tensor([visit.cut.left_top[::-1] for visit in visits]),
            target_sizes_hw_B2=torch.tensor([bucket[::-1]] * len(visits)),
            flipped=tuple(visit.cut.flipped for visit in visits),
            images_BCHW=None if latents else to_model_range(data),
            latents_BCHW=data if latents else None,
            conditioning_images_BCHW=to_model_range(torch.stack(guides)) if guides else None,
            loss_masks_BHW=_stacked_masks([visit.mask_hw for visit in visits], bucket),
            network_multiplier=resolved.spec.network_multiplier,
        )


def _loss_weight(visit: _Visit, spec: DatasetSpec) -> float:
    return spec.prior_loss_weight if visit.record.is_reg else 1.0


def _stacked_masks(masks_hw: Sequence[torch.Tensor | None], bucket: Size) -> torch.Tensor | None:
    """Weights 0..1 of all samples, 1 everywhere for those that have no mask; None if none has one."""
    if all(mask_hw is None for mask_hw in masks_hw):
        return None
    whole_hw = torch.full(latent_shape(bucket)[1:], 255, dtype=torch.uint8)
    return torch.stack([whole_hw if mask_hw is None else mask_hw for mask_hw in masks_hw]).float() / 255
