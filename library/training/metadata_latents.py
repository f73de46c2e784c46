"""Training sizes and latents for the images of a metadata file, ahead of training (tools/prepare_buckets_latents.py).

Sizes come from the headers, so the metadata file is whole before the first image is encoded; a run that was stopped
goes on where it was, because latents that fit are not made again. The work grows with the number of images, whatever
the number of buckets.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from torch import nn

from library.checkpoint.hashes import fingerprints_in
from library.data.buckets import bucket_sizes, fit
from library.data.cache import LatentStore
from library.data.records import (
    Augmentation,
    BucketRules,
    DatasetKind,
    DatasetSpec,
    ImageRecord,
    ResolvedDataset,
    SubsetSpec,
)
from library.data.report import describe
from library.device import check_precision, choose_device, empty_cache, weight_dtype
from library.families.stable import find_source
from library.log import UserError
from library.models.load import Target, load_vae, recognise
from library.models.spec import SDXL_LATENT_SCALE
from library.options import PrecisionOptions
from library.options.implied import SDXL_BUCKET_STEP
from library.options.preparation import PrepareOptions
from library.preparation.files import image_key, measure_images
from library.preparation.metadata import MetadataFile
from library.preparation.outcome import Outcome
from library.training.caching import cache_latents

logger = logging.getLogger(__name__)
_WORKERS = 4
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def prepare_latents(options: PrepareOptions) -> Outcome:
    """Write ``train_resolution`` of each image to the metadata file and latents beside the image. Raises UserError."""
    if options.recursive and not options.full_path:
        raise UserError("--recursive needs --full_path: names alone do not find images of subfolders again")
    width, height = options.max_resolution
    if not options.bucket_no_upscale and max(width, height) > options.max_bucket_reso:
        raise UserError(
            f"--max_bucket_reso {options.max_bucket_reso}: is below --max_resolution {width},{height}; raise it"
        )
    device = choose_device()
    check_precision(PrecisionOptions(mixed_precision=options.mixed_precision), device)
    metadata = MetadataFile.open(str(options.out_json), str(options.in_json))
    outcome = Outcome()
    dataset = _dataset_of(options, outcome)
    _log_differences(metadata, dataset)
    vae, space = _load_vae(options)
    _check_steps(options, space)
    for record, image_fit in zip(dataset.records, dataset.fits, strict=True):
        metadata.set(record.key, "train_resolution", list(image_fit.bucket))
    metadata.save()
    _log_buckets(dataset)
    dtype = weight_dtype(options.mixed_precision)
    hashes = fingerprints_in(vae, _TYPES)
    own = hashes.pop(dtype)
    store = LatentStore(space, own, to_disk=True, same_vae=lambda: sorted(hashes.values()), takes_over=True)
    _, report = cache_latents(
        [dataset],
        vae,
        store,
        vae_batch_size=options.batch_size,
        device=device,
        dtype=dtype,
        workers=_WORKERS if options.max_data_loader_n_workers is None else options.max_data_loader_n_workers,
        on_bad_image="skip",
        after_group=partial(empty_cache, device),
    )
    keys = {record.path: record.key for record in dataset.records}
    for problem in report.problems:
        outcome.fail(problem.path, problem.reason)
        del metadata.entries[keys[problem.path]]["train_resolution"]
    if report.problems:
        metadata.save()
    outcome.done, outcome.skipped = report.encoded, report.reused
    return outcome


def _dataset_of(options: PrepareOptions, outcome: Outcome) -> ResolvedDataset:
    """The images of the folder with their buckets; those that cannot be used are noted as failures."""
    rules = BucketRules(
        options.max_resolution,
        True,
        options.min_bucket_reso,
        options.max_bucket_reso,
        options.bucket_reso_steps,
        options.bucket_no_upscale,
    )
    sizes = bucket_sizes(rules)
    images, problems = measure_images(str(options.train_data_dir), options.recursive)
    for problem in problems:
        outcome.fail(problem.path, problem.reason)
    records: list[ImageRecord] = []
    first_of_stem: dict[Path, Path] = {}
    for path, size in images:
        first = first_of_stem.setdefault(path.with_suffix(""), path)
        if first is not path:
            outcome.fail(str(path), f"would share its .npz with {first.name}; rename one of them")
            continue
        key = image_key(path, options.full_path)
        records.append(ImageRecord(key, str(path), size, "", repeats=1, is_reg=False, subset=0))
    if not records:
        raise UserError(f"{options.train_data_dir}: none of the images can be used")
    subset = SubsetSpec(image_dir=options.train_data_dir, augmentation=Augmentation(flip_aug=options.flip_aug))
    spec = DatasetSpec(DatasetKind.FINETUNE, options.batch_size, rules, (subset,))
    return ResolvedDataset(spec, tuple(records), tuple(fit(record.size, rules, sizes) for record in records))


def _load_vae(options: PrepareOptions) -> tuple[nn.Module, str]:
    """The VAE in float32 on the CPU, and the name of its latent space."""
    option = "model_name_or_path"
    path = find_source(str(options.model_name_or_path), option, ("vae",)).path
    vae = load_vae(path, Target(torch.float32), option)
    if options.sdxl or abs(float(vae.config["scaling_factor"]) - SDXL_LATENT_SCALE) < 1e-6:
        return vae, "sdxl"
    try:
        return vae, "sdxl" if recognise(path).spec.family == "sdxl" else "sd"
    except UserError:
        logger.warning("%s: a VAE alone; its latents are marked for SD 1.x and 2.x, with --sdxl for SDXL", path)
        return vae, "sd"


def _log_differences(metadata: MetadataFile, dataset: ResolvedDataset) -> None:
    keys = {record.key for record in dataset.records}
    alone, new = metadata.entries.keys() - keys, keys - metadata.entries.keys()
    if alone:
        logger.warning("%d entries of the metadata have no image here (%s ...); they stay", len(alone), min(alone))
    if new:
        logger.warning("%d images have no entry yet (%s ...); they get one without text", len(new), min(new))


def _log_buckets(dataset: ResolvedDataset) -> None:
    (report,) = describe([dataset])
    for bucket in report.buckets:
        logger.info("bucket %dx%d: %d images", *bucket.size, bucket.images)
    logger.info("mean difference of aspect ratios: %.4f", report.mean_ar_error)


def _check_steps(options: PrepareOptions, space: str) -> None:
    if space == "sdxl" and options.bucket_reso_steps % SDXL_BUCKET_STEP:
        raise UserError(
            f"--bucket_reso_steps {options.bucket_reso_steps}: must be a multiple of {SDXL_BUCKET_STEP} for SDXL"
        )
