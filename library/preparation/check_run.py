"""Checking a data set: found as training finds it, decoded once, reported, and what is bad moved aside."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.checkpoint.io import atomic_write_text
from library.data.index import image_names
from library.data.loader import prefetch
from library.data.records import (
    Augmentation,
    BucketRules,
    CaptionRules,
    DatasetKind,
    DatasetSpec,
    ResolvedDataset,
    SubsetSpec,
)
from library.data.report import describe
from library.data.sources import resolve
from library.data.spec import load_dataset_specs
from library.log import UserError, progress
from library.options import DataOptions, MaskOptions
from library.options.preparation import CheckDatasetOptions
from library.options.settings import Settings
from library.preparation.check import MIN_SIDE_PX, CheckReport, Limits, check, unique_images
from library.preparation.check_page import report_lines, report_page
from library.preparation.looks import look_at
from library.preparation.quarantine import RECORD_NAME, carry_out, plan_moves
from library.text.tokens import count_tokens

logger = logging.getLogger(__name__)
_USUAL_RESOLUTION = (512, 512)


def check_dataset(settings: Settings) -> CheckReport:
    """Report on the data set of the options, and move aside what they say. Raises UserError."""
    options, data = settings[CheckDatasetOptions], settings[DataOptions]
    if options.dry_run and options.quarantine is None:
        raise UserError("--dry_run needs --quarantine, whose moves it shows; without it nothing is moved in any case")
    datasets = resolve(
        _specs(options, data, settings[MaskOptions].conditioning_data_dir), "skip", "skip", allow_captionless=True
    )
    images = unique_images(datasets)
    looks = list(progress(prefetch(images, look_at, data.max_data_loader_n_workers), "images", total=len(images)))
    reports = describe(datasets, count_tokens, options.max_token_length)
    limits = Limits(
        options.min_side or _usual_min_side(datasets), int(options.max_megabytes * 1e6), options.duplicate_distance
    )
    report = check(datasets, reports, looks, limits)
    for line in report_lines(report):
        logger.info("%s", line)
    if options.html:
        atomic_write_text(Path(options.html).expanduser(), report_page(report, options.thumbnails))
        logger.info("page written to %s", options.html)
    if options.quarantine is not None:
        _quarantine(report, options, options.quarantine.expanduser())
    return report


def _usual_min_side(datasets: Sequence[ResolvedDataset]) -> int:
    """256 pixels, unless a training size is smaller."""
    rules = [dataset.spec.buckets for dataset in datasets]
    return min([MIN_SIDE_PX, *(side for rule in rules if rule is not None for side in rule.resolution)])


def _quarantine(report: CheckReport, options: CheckDatasetOptions, folder: Path) -> None:
    moves = plan_moves(report, options.quarantine_kinds, folder)
    for move in moves:
        logger.info("%s -> %s: %s", move.source, move.target, move.reason)
    if options.dry_run:
        logger.info("%d files would be moved", len(moves))
        return
    count = carry_out(moves, folder)
    logger.info("%d files moved%s", count, f"; {folder / RECORD_NAME} says where they were" if count else "")


def _specs(options: CheckDatasetOptions, data: DataOptions, mask_dir: str | None) -> tuple[DatasetSpec, ...]:
    """The data sets; without a resolution in the options or the file that of SD 1.x with buckets is taken.

    A folder of pictures beside the images is taken for their masks: those that have none are found.
    """
    if data.resolution is None:
        has_file = data.dataset_config is not None
        data = replace(data, resolution=_USUAL_RESOLUTION, enable_bucket=data.enable_bucket or not has_file)
    if options.folder is None:
        return load_dataset_specs(data, conditioning_data_dir=mask_dir, masks=True)
    folder = os.path.expanduser(options.folder)
    if not os.path.isdir(folder):
        raise UserError(f"folder {options.folder}: there is no such folder")
    if not image_names(folder):
        data = replace(data, train_data_dir=options.folder, dataset_config=None, in_json=None)
        return load_dataset_specs(data, conditioning_data_dir=mask_dir, masks=True)
    names = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
    rules = BucketRules(data.resolution or _USUAL_RESOLUTION, **{name: getattr(data, name) for name in names})
    subset = SubsetSpec(
        image_dir=options.folder,
        mask_dir=mask_dir,
        alpha_mask=data.alpha_mask,
        caption_extension=data.caption_extension,
        captions=CaptionRules(caption_separator=data.caption_separator),
        augmentation=Augmentation(),
    )
    return (DatasetSpec(DatasetKind.DREAMBOOTH, data.train_batch_size, rules, (subset,)),)
