"""The images that are never trained on, so that the loss on them can be measured.

Which they are depends on ``--validation_seed`` and their file names alone: runs with other settings hold out the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from library.data.records import Augmentation, CaptionRules, ImageRecord, ResolvedDataset, SubsetSpec
from library.log import UserError
from library.options import ValidationOptions
from library.rng import seed_of

Datasets = tuple[ResolvedDataset, ...]


def hold_out(datasets: Sequence[ResolvedDataset], options: ValidationOptions) -> tuple[Datasets, Datasets]:
    """The data sets to train on, and those to validate on (none without ``--validation_split``).

    Of each subset the share of images is held out whose file names come first in an order drawn from the seed, rounded,
    but never all of them. An image that is held out in one subset is trained on in no other. Regularisation images
    stay. Held-out images appear once, neither augmented nor with captions that vary by chance or moment (wildcards are
    drawn once). Raises UserError if nothing is held out, or nothing is left to train on.
    """
    if not options.validation_split:
        return tuple(datasets), ()
    chosen = {path for dataset in datasets for path in _chosen_paths(dataset, options)}
    if not chosen:
        most = max((sum(not record.is_reg for record in dataset.records) for dataset in datasets), default=0)
        raise UserError(
            f"--validation_split {options.validation_split:g} holds out no image (data sets have up to {most} images);"
            " give a larger share, or leave it out"
        )
    training = tuple(_part(dataset, lambda record: record.path not in chosen) for dataset in datasets)
    if not all(dataset.has_training_images for dataset in training):
        raise UserError("--validation_split leaves a data set without images to train on; give a smaller share")
    held_out = (_part(dataset, lambda record: record.path in chosen and not record.is_reg) for dataset in datasets)
    return training, tuple(_undisturbed(dataset) for dataset in held_out if dataset.records)


def _chosen_paths(dataset: ResolvedDataset, options: ValidationOptions) -> Iterable[str]:
    for number in range(len(dataset.spec.subsets)):
        paths = [record.path for record in dataset.records if record.subset == number and not record.is_reg]
        # by file name: moving the folder, or adding another, does not change what is held out
        names = {path: os.path.basename(path) for path in paths}
        order = sorted(paths, key=lambda path: seed_of(options.validation_seed, "validation split", names[path]))
        yield from order[: min(len(order) - 1, int(len(order) * options.validation_split + 0.5))] if order else ()


def _part(dataset: ResolvedDataset, wanted: Callable[[ImageRecord], bool]) -> ResolvedDataset:
    pairs = [(record, fit) for record, fit in zip(dataset.records, dataset.fits, strict=True) if wanted(record)]
    return replace(dataset, records=tuple(record for record, _ in pairs), fits=tuple(fit for _, fit in pairs))


def _undisturbed(dataset: ResolvedDataset) -> ResolvedDataset:
    spec = replace(dataset.spec, subsets=tuple(_without_chance(subset) for subset in dataset.spec.subsets))
    return replace(dataset, spec=spec, records=tuple(replace(record, repeats=1) for record in dataset.records))


def _without_chance(subset: SubsetSpec) -> SubsetSpec:
    usual = CaptionRules()
    captions = replace(
        subset.captions,
        shuffle_caption=usual.shuffle_caption,
        caption_dropout_rate=usual.caption_dropout_rate,
        caption_dropout_every_n_epochs=usual.caption_dropout_every_n_epochs,
        caption_tag_dropout_rate=usual.caption_tag_dropout_rate,
        token_warmup_min=usual.token_warmup_min,
        token_warmup_step=usual.token_warmup_step,
    )
    return replace(subset, captions=captions, augmentation=Augmentation())
