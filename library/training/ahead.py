"""Caches of a training made ahead of it, by tools/cache_latents.py and tools/cache_text_encoder_outputs.py.

Both take the options of the training, so that it finds everything as it would have made it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from accelerate import PartialState

from library.checkpoint.hashes import weights_fingerprint
from library.data.cache import LatentStore
from library.data.sources import resolve
from library.data.spec_checks import uncacheable_captions, uncacheable_subsets
from library.device import check_precision, choose_device, empty_cache, vae_dtype, weight_dtype
from library.families import family_for
from library.log import UserError
from library.options import CacheOptions, DataOptions, HubOptions, ModelOptions, NetworkOptions, PrecisionOptions
from library.options.settings import Settings
from library.training.caching import CachingReport, WorkShare, cache_latents, fingerprints_served
from library.training.preflight import check_bucket_steps
from library.training.specs import dataset_specs
from library.training.text_caching import CaptionEncoder, TextCachingReport, cache_captions, text_cache_options
from library.training.text_source import text_settings

logger = logging.getLogger(__name__)


def cache_latents_ahead(settings: Settings) -> CachingReport:
    """Make the latent archives of a training with these options. Raises UserError."""
    cache, data = settings[CacheOptions], settings[DataOptions]
    datasets = resolve(dataset_specs(settings), data.on_bad_image, data.on_bad_caption, allow_captionless=True)
    obstacles = uncacheable_subsets([dataset.spec for dataset in datasets])
    if obstacles:
        raise UserError.of(obstacles)
    model, precision = settings[ModelOptions], settings[PrecisionOptions]
    device, share = _join(precision)
    dtype = vae_dtype(precision)
    family = family_for(model, settings.family)
    check_bucket_steps(family, datasets)
    load_vae = partial(family.load_vae, model, token=settings[HubOptions].huggingface_token)
    vae = load_vae(dtype=dtype, device=device)
    served = partial(fingerprints_served, load_vae, dtype)
    store = LatentStore(family.latent_space, weights_fingerprint(vae), to_disk=True, same_vae=served)
    _, report = cache_latents(
        datasets,
        vae,
        store,
        vae_batch_size=cache.vae_batch_size,
        device=device,
        dtype=dtype,
        workers=data.max_data_loader_n_workers,
        share=share,
        on_bad_image=data.on_bad_image,
        after_group=None if precision.highvram else partial(empty_cache, device),
    )
    logger.info("latents: %d images, %d were there, %d made", report.total, report.reused, report.encoded)
    return report


def cache_text_ahead(settings: Settings) -> TextCachingReport:
    """Make the archives of text encoder outputs of a training with these options. Raises UserError."""
    data, model, precision = settings[DataOptions], settings[ModelOptions], settings[PrecisionOptions]
    options = replace(text_cache_options(settings), cache_text_encoder_outputs_to_disk=True)
    specs = dataset_specs(settings)
    obstacles = uncacheable_captions(specs, options.cache_text_encoder_outputs_variants or 0)
    if obstacles:
        raise UserError.of(obstacles)
    datasets = resolve(specs, data.on_bad_image, data.on_bad_caption, data.allow_captionless)
    device, share = _join(precision)
    if precision.fp8_base or settings[NetworkOptions].base_weights:
        logger.warning("--fp8_base and --base_weights change the text encoders of a training: it will encode again")
    family = family_for(model, settings.family)
    encoders, specs_of_encoders = family.load_text_encoders(
        model,
        dtype=weight_dtype(precision.mixed_precision),
        device=device,
        token=settings[HubOptions].huggingface_token,
    )
    encode = CaptionEncoder(family, encoders, specs_of_encoders, text_settings(model, family))
    _, report = cache_captions(datasets, encode, options, memory_dtype=torch.float32, share=share)
    return report


def _join(precision: PrecisionOptions) -> tuple[torch.device, WorkShare]:
    """The device, and this process's share of the work. Raises UserError for what this machine cannot do."""
    device = choose_device()
    state = PartialState(cpu=device.type == "cpu")  # without cpu=True it starts no group on a CPU machine
    check_precision(precision, device)
    return device, WorkShare(state.process_index, state.num_processes, state.wait_for_everyone)
