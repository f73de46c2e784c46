"""Models, latents, the training step and previews: what a run needs of the heavy parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from library.checkpoint.hashes import weights_fingerprint
from library.data.cache import LatentStore
from library.data.dataset import TrainImages
from library.data.records import ResolvedDataset
from library.data.text_cache import TextStore
from library.device import attention_kind, one_process_at_a_time
from library.diffusion.objective import Objective
from library.diffusion.schedule import NoiseSchedule
from library.families import family_for
from library.families.base import ModelFamily, ModelParts
from library.generation.control import when_guided
from library.generation.engine import Engine, EngineSettings
from library.log import UserError
from library.models.memory import keep_less_for_backward, set_attention, set_gradient_checkpointing
from library.options import (
    CacheOptions,
    DataOptions,
    HubOptions,
    LossOptions,
    ModelOptions,
    NoiseOptions,
    PrecisionOptions,
    SampleOptions,
    SaveOptions,
    ValidationOptions,
)
from library.options.settings import Settings
from library.rng import seed_of
from library.training.caching import (
    WorkShare,
    bind_prepared_latents,
    cache_latents,
    fingerprints_served,
    leave_out_lone_latents,
)
from library.training.latent_source import LatentSource
from library.training.machine import Machine
from library.training.preflight import check_bucket_steps
from library.training.preview import Previewer
from library.training.report import Reporter
from library.training.script import Script
from library.training.step import TrainStep
from library.training.text_caching import CaptionEncoder, cache_captions, text_cache_options
from library.training.text_source import CachedTextSource, TextSource, text_learns, text_settings
from library.training.trackers import Trackers
from library.training.trainable import Trainable
from library.training.validation import Probe, Validator, fixed_objectives

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """Loaded models with what learns, and the data they meet (no image data with ``--dataset_class``).

    ``held_out`` are the images of the validation, if there is one.
    """

    family: ModelFamily
    parts: ModelParts
    trainable: Trainable
    images: TrainImages
    text_learns: bool
    text_store: TextStore | None = None
    held_out: TrainImages | None = None


def load_models(
    script: Script,
    settings: Settings,
    datasets: Sequence[ResolvedDataset],
    held_out: Sequence[ResolvedDataset],
    machine: Machine,
    seed: int,
) -> Models:
    """Base model, cached latents, and what learns, on the device."""
    count = len(datasets)
    datasets = (*datasets, *held_out)
    options = settings[ModelOptions]
    family = family_for(options, settings.family)
    check_bucket_steps(family, datasets)
    types = dict.fromkeys(script.load_kind().trained_parts(settings), machine.trained_dtype)
    types["vae"] = machine.vae_dtype
    with one_process_at_a_time(settings[PrecisionOptions].lowram):
        parts = family.load(
            options,
            dtype=machine.weight_dtype,
            device=machine.device,
            part_dtypes=types,
            token=settings[HubOptions].huggingface_token,
        )
    if parts.zero_terminal_snr and not settings[NoiseOptions].zero_terminal_snr:
        logger.warning("%s was trained with zero terminal SNR: --zero_terminal_snr is missing", parts.source.name)
    # before the latents: the network's arguments may be refused
    trainable, learns = attach(script, settings, family, parts, machine, seed)
    trainable.require_multipliers(dataset.spec.network_multiplier for dataset in datasets)
    family = trainable.family_of_prompts(family)
    datasets, store = make_latents(settings, datasets, family, parts, machine)
    variants = text_cache_options(settings).cache_text_encoder_outputs_variants or 0
    if count and not any(dataset.has_training_images for dataset in datasets[:count]):
        raise UserError("no image is left to train on: none of those that are not held out can be used")
    on_bad = settings[DataOptions].on_bad_image
    images = TrainImages(datasets[:count], store, seed, on_bad, variants)
    own_seed = seed_of(settings[ValidationOptions].validation_seed, "validation")
    validation = TrainImages(datasets[count:], store, own_seed, on_bad, variants)
    gives_latents = (one.gives_latents(index) for one in (images, validation) for index in range(len(one.datasets)))
    if datasets and all(gives_latents):
        torch.nn.Module.to(parts.vae, "cpu")
        machine.empty_cache()
    text_store = make_text_outputs(settings, datasets, family, parts, machine, learns)
    return Models(family, parts, trainable, images, learns, text_store, validation if held_out else None)


def attach(
    script: Script, settings: Settings, family: ModelFamily, parts: ModelParts, machine: Machine, seed: int
) -> tuple[Trainable, bool]:
    """What learns, attached to loaded models that save memory as the options say; and whether it is reached by text."""
    set_attention(parts.unet, attention_kind(settings[PrecisionOptions]))
    keep_less_for_backward(parts.unet)
    torch.manual_seed(seed_of(seed, "network init"))
    trainable = script.load_kind()(settings, family, parts)
    torch.nn.Module.to(trainable.module, machine.device, machine.trained_dtype)  # diffusers' own warns of nothing
    learns = text_learns(family, parts, trainable, machine.weight_dtype)
    save_memory(settings[PrecisionOptions], parts, trainable, learns)
    return trainable, learns


def save_memory(options: PrecisionOptions, parts: ModelParts, trainable: Trainable, text_learns: bool) -> None:
    """Gradient checkpointing and compilation, once everything is attached."""
    if options.gradient_checkpointing:
        set_gradient_checkpointing(parts.unet, parts.text_encoders if text_learns else ())
        trainable.enable_gradient_checkpointing()
    if options.torch_compile and options.dynamo_backend != "no":
        parts.unet.compile_repeated_blocks(backend=options.dynamo_backend)


def make_latents(
    settings: Settings,
    datasets: Sequence[ResolvedDataset],
    family: ModelFamily,
    parts: ModelParts,
    machine: Machine,
) -> tuple[Sequence[ResolvedDataset], LatentStore | None]:
    """Latents made ahead, if asked for, or if a metadata file names prepared ones."""
    cache, data = settings[CacheOptions], settings[DataOptions]
    has_prepared = any(record.npz_path for dataset in datasets for record in dataset.records)
    if not cache.cache_latents and not has_prepared:
        return datasets, None
    store = LatentStore(
        family.latent_space,
        weights_fingerprint(parts.vae),
        to_disk=cache.cache_latents_to_disk,
        memory_dtype=machine.vae_dtype,
        same_vae=partial(
            fingerprints_served, lambda: family.reload(parts, ("vae",), torch.float32).vae, machine.vae_dtype
        ),
    )
    if has_prepared:
        bind_prepared_latents(datasets, store, parts.vae, device=machine.device, dtype=machine.vae_dtype)
        if not cache.cache_latents:
            datasets = leave_out_lone_latents(datasets, store, data.on_bad_image)
    if cache.cache_latents:
        datasets, report = cache_latents(
            datasets,
            parts.vae,
            store,
            vae_batch_size=cache.vae_batch_size,
            device=machine.device,
            dtype=machine.vae_dtype,
            workers=data.max_data_loader_n_workers,
            share=WorkShare(machine.rank, machine.processes, machine.wait),
            on_bad_image=data.on_bad_image,
            after_group=None if settings[PrecisionOptions].highvram else machine.empty_cache,
        )
        logger.info("latents: %d images, %d reused, %d encoded", report.total, report.reused, report.encoded)
    return datasets, store


def make_text_outputs(
    settings: Settings,
    datasets: Sequence[ResolvedDataset],
    family: ModelFamily,
    parts: ModelParts,
    machine: Machine,
    text_learns: bool,
) -> TextStore | None:
    """What the text encoders make of all captions, if that is to be cached; the encoders leave the device then."""
    options = text_cache_options(settings)
    if not options.cache_text_encoder_outputs:
        return None
    if text_learns:
        raise UserError("--cache_text_encoder_outputs: the text encoders learn here, so leave it out")
    store, _ = cache_captions(
        datasets,
        CaptionEncoder(
            family, parts.text_encoders, parts.spec.text_encoders, text_settings(settings[ModelOptions], family)
        ),
        options,
        memory_dtype=machine.weight_dtype,
        share=WorkShare(machine.rank, machine.processes, machine.wait),
    )
    for encoder in parts.text_encoders:
        encoder.to("cpu")
    machine.empty_cache()
    return store


def make_text_source(settings: Settings, models: Models, machine: Machine) -> TextSource | CachedTextSource:
    """Where the step takes the text condition from."""
    if models.text_store is not None:
        return CachedTextSource(models.text_store, device=machine.device, dtype=machine.weight_dtype)
    subsets = [subset for dataset in models.images.datasets for subset in dataset.spec.subsets]
    repeats = bool(subsets) and not any(subset.captions.is_random for subset in subsets)
    how = text_settings(settings[ModelOptions], models.family)
    pads = not settings.value_of("no_token_padding")
    return TextSource(
        models.family,
        models.parts,
        how if pads else replace(how, shrink=True, pad=False),
        learns=models.text_learns,
        captions_repeat=repeats and pads,  # without padding a caption's length depends on its batch
        device=machine.device,
        dtype=machine.weight_dtype,
    )


def make_step(settings: Settings, models: Models, machine: Machine, schedule: NoiseSchedule) -> TrainStep:
    """The training step with its sources."""
    return TrainStep(
        family=models.family,
        parts=models.parts,
        trainable=models.trainable,
        latents=LatentSource(models.family, models.parts.vae, machine.device),
        text=make_text_source(settings, models, machine),
        schedule=schedule,
        objective=Objective(settings[NoiseOptions], settings[LossOptions]),
        compute_dtype=machine.weight_dtype,
        device=machine.device,
        processes=machine.processes,
    )


def make_validator(
    settings: Settings,
    models: Models,
    machine: Machine,
    step: TrainStep,
    reporter: Reporter,
    weights: Callable[[], AbstractContextManager[object]],
) -> Validator | None:
    """What measures the loss on held-out images; None if there are none."""
    if models.held_out is None:
        return None
    modules = (*models.parts.modules(), models.trainable.module)
    objectives = fixed_objectives(settings[NoiseOptions], settings[LossOptions])
    probe = Probe(step, models.trainable, objectives, modules, weights)
    workers = settings[DataOptions].max_data_loader_n_workers
    return Validator(settings[ValidationOptions], models.held_out, probe, machine, reporter, workers)


def make_previewer(
    settings: Settings,
    models: Models,
    machine: Machine,
    schedule: NoiseSchedule,
    trackers: Trackers,
    weights: Callable[[], AbstractContextManager[object]],
) -> Previewer:
    """Previews at full strength, with the weights that ``weights`` puts in place."""

    @contextmanager
    def in_use() -> Generator[None]:
        models.trainable.on_micro_batch(1.0)
        with weights():
            yield

    sample, save = settings[SampleOptions], settings[SaveOptions]
    net = models.trainable.preview_extension()
    engine = Engine(
        models.family,
        models.parts,
        EngineSettings(
            schedule=schedule,
            device=machine.device,
            dtype=machine.weight_dtype,
            clip_skip=text_settings(settings[ModelOptions], models.family).clip_skip,
            precision=lambda: models.trainable.precision(machine.device, machine.weight_dtype),
        ),
        extensions=[] if net is None else [when_guided(net)],
    )
    return Previewer(
        sample,
        engine,
        sampler=sample.sample_sampler,
        output_dir=str(save.output_dir),
        output_name=save.output_name,
        trained=(models.trainable.module,),
        in_use=in_use,
        rank=machine.rank,
        processes=machine.processes,
        trackers=trackers.open(machine.accelerator),
        barrier=machine.wait,
    )
