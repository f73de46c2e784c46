"""Builds everything that a training run turns over, in the order in which it can fail: cheap checks first, models last."""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from library.data.cache import LatentStore
from library.data.dataset import TrainImages
from library.data.records import ResolvedDataset
from library.device import attention_kind
from library.diffusion.objective import Objective
from library.diffusion.schedule import NoiseSchedule, make_schedule
from library.families import family_for
from library.families.base import ModelFamily, ModelParts, TextSettings
from library.generation.pipeline import GenerationSettings
from library.log import Progress, progress
from library.models.memory import set_attention, set_gradient_checkpointing
from library.options import (
    CacheOptions,
    DataOptions,
    LoopOptions,
    LossOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
    PrecisionOptions,
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
)
from library.options.settings import Settings
from library.rng import seed_of
from library.training.arrange import Arrangement, make_clock
from library.training.caching import WorkShare, bind_prepared_latents, cache_latents, vae_fingerprint
from library.training.clock import Clock
from library.training.guard import FiniteGuard
from library.training.interrupt import StopRequest
from library.training.latent_source import LatentSource
from library.training.loop import Job
from library.training.lr import Schedule, create_schedule, learning_rates
from library.training.machine import Machine, open_machine
from library.training.optimizers import OptimizerMode, create_optimizer
from library.training.metadata import model_facts
from library.training.output import Output, identify
from library.training.preview import Previewer
from library.training.report import Reporter
from library.training.script import Script
from library.training.state import RunState, read_run
from library.training.step import TrainStep
from library.training.text_source import TextSource
from library.training.trainable import Trainable
from library.training.trackers import Trackers
from library.training.update import WeightUpdate

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is ready to start."""

    job: Job
    clock: Clock
    output: Output
    previewer: Previewer
    trackers: Trackers
    bar: Progress[int]


@dataclass(frozen=True)
class Models:
    """Loaded models with what learns, and the data they meet."""

    family: ModelFamily
    parts: ModelParts
    trainable: Trainable
    images: TrainImages


def build_run(script: Script, settings: Settings, datasets: Sequence[ResolvedDataset], stop: StopRequest) -> Run:
    """Everything up to the first step."""
    trackers = Trackers(settings, script.tracker_name)
    machine = open_machine(settings, trackers)
    resumed = read_run(settings[SaveOptions].resume) if settings[SaveOptions].resume else None
    seed = choose_seed(settings, machine, resumed)
    clock = make_clock(datasets, settings[LoopOptions], machine.processes)
    models = load_models(script, settings, datasets, machine, seed)
    schedule = make_schedule(models.parts.prediction_type, settings[NoiseOptions].zero_terminal_snr).to(machine.device)
    step = make_step(settings, models, machine, schedule)
    optimizer, optimizer_name = create_optimizer(
        settings[OptimizerOptions],
        models.trainable.parameter_groups(),
        machine.device,
        loss_scaling=machine.accelerator.scaler is not None,
    )
    lr_schedule = create_schedule(settings[ScheduleOptions], optimizer, clock.max_train_steps)
    update = make_update(settings, models, machine, step, optimizer, lr_schedule)
    arrangement = make_arrangement(settings, models, machine, seed)
    bar = progress(clock.max_train_steps, "steps")
    window = len(arrangement.plan(1))
    reporter = Reporter(bar, window, lambda: learning_rates(optimizer), trackers.log)
    facts = model_facts(models.family, models.parts)
    identity = identify(settings, seed, datasets, facts, machine.processes, resumed)
    output = Output(
        settings,
        machine,
        models.trainable,
        identity,
        facts,
        datasets,
        clock,
        reporter,
        optimizer,
        optimizer_name,
        lr_schedule,
    )
    if resumed and settings[SaveOptions].resume:
        output.restore(str(settings[SaveOptions].resume), resumed)
    trackers.start(settings, machine.accelerator)
    previewer = make_previewer(settings, models, machine, schedule, trackers, OptimizerMode(optimizer))
    job = Job(
        clock=clock,
        step=update.step,
        trainable=models.trainable,
        update=update,
        guard=FiniteGuard(settings[LoopOptions].on_nan, machine.accelerator.scaler is not None),
        plan=arrangement.plan,
        batches=arrangement.batches,
        effects=(reporter, previewer, output.saver),
        stop=stop,
        seed=seed,
        rank=machine.rank,
    )
    return Run(job, clock, output, previewer, trackers, bar)


def make_update(
    settings: Settings, models: Models, machine: Machine, step: TrainStep, optimizer: Any, schedule: Schedule
) -> WeightUpdate:
    """Step and optimizer as accelerate wraps them, with the schedule."""
    wrapped_step, wrapped_optimizer = machine.accelerator.prepare(step, optimizer)
    return WeightUpdate(
        machine.accelerator,
        wrapped_step,
        wrapped_optimizer,
        schedule,
        models.trainable.trained_parameters(),
        settings[OptimizerOptions].max_grad_norm,
    )


def make_arrangement(settings: Settings, models: Models, machine: Machine, seed: int) -> Arrangement:
    """The order of the data in this process."""
    return Arrangement(
        models.images,
        seed,
        settings[LoopOptions].gradient_accumulation_steps,
        settings[DataOptions].max_data_loader_n_workers,
        machine.rank,
        machine.processes,
    )


def choose_seed(settings: Settings, machine: Machine, resumed: RunState | None) -> int:
    """The run's seed: given, or that of the run being resumed, or drawn; the same in all processes."""
    given = settings[LoopOptions].seed
    if given is not None:
        return given
    if resumed is not None:
        return resumed.seed
    seed = int(machine.agree(random.SystemRandom().randrange(2**32)))
    logger.info("seed %d (give it with --seed to repeat this run)", seed)
    return seed


def load_models(
    script: Script, settings: Settings, datasets: Sequence[ResolvedDataset], machine: Machine, seed: int
) -> Models:
    """Base model, cached latents, and what learns, on the device."""
    options = settings[ModelOptions]
    family = family_for(options)
    parts = family.load(options, dtype=machine.weight_dtype, device=machine.device, vae_dtype=machine.vae_dtype)
    set_attention(parts.unet, attention_kind(settings[PrecisionOptions]))
    datasets, store = make_latents(settings, datasets, family, parts, machine)
    images = TrainImages(datasets, store, seed, settings[DataOptions].on_bad_image)
    if all(images.gives_latents(index) for index in range(len(images.datasets))):
        parts.vae.to("cpu")
        machine.empty_cache()
    torch.manual_seed(seed_of(seed, "network init"))
    module, _, name = script.kind.partition(":")
    trainable: Trainable = getattr(importlib.import_module(module), name)(settings, family, parts)
    trainable.module.to(machine.device, machine.trained_dtype)
    save_memory(settings[PrecisionOptions], parts, trainable)
    return Models(family, parts, trainable, images)


def save_memory(options: PrecisionOptions, parts: ModelParts, trainable: Trainable) -> None:
    """Gradient checkpointing and compilation, once everything is attached."""
    if options.gradient_checkpointing:
        set_gradient_checkpointing(parts.unet, parts.text_encoders if trainable.needs_text_gradient else ())
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
        vae_fingerprint(parts.vae),
        to_disk=cache.cache_latents_to_disk,
        memory_dtype=machine.vae_dtype,
    )
    if has_prepared:
        bind_prepared_latents(datasets, store)
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


def make_step(settings: Settings, models: Models, machine: Machine, schedule: NoiseSchedule) -> TrainStep:
    """The training step with its sources."""
    options = settings[ModelOptions]
    repeats = all(
        not subset.captions.is_random for dataset in models.images.datasets for subset in dataset.spec.subsets
    )
    text = TextSource(
        models.family,
        models.parts,
        TextSettings(options.max_token_length, options.clip_skip, options.weighted_captions),
        learns=models.trainable.needs_text_gradient,
        captions_repeat=repeats,
        device=machine.device,
        dtype=machine.weight_dtype,
    )
    return TrainStep(
        family=models.family,
        parts=models.parts,
        trainable=models.trainable,
        latents=LatentSource(models.family, models.parts.vae, machine.device),
        text=text,
        schedule=schedule,
        objective=Objective(settings[NoiseOptions], settings[LossOptions]),
        compute_dtype=machine.weight_dtype,
        device=machine.device,
        processes=machine.processes,
    )


def make_previewer(
    settings: Settings,
    models: Models,
    machine: Machine,
    schedule: NoiseSchedule,
    trackers: Trackers,
    mode: OptimizerMode,
) -> Previewer:
    """Previews with the weights that would be saved, at full strength."""

    @contextmanager
    def in_use() -> Iterator[None]:
        models.trainable.on_micro_batch(1.0)
        with mode.evaluating():
            yield

    sample, save = settings[SampleOptions], settings[SaveOptions]
    return Previewer(
        sample,
        models.family,
        models.parts,
        GenerationSettings(
            schedule=schedule,
            device=machine.device,
            dtype=machine.weight_dtype,
            clip_skip=settings[ModelOptions].clip_skip,
            default_sampler=sample.sample_sampler,
            precision=lambda: models.trainable.precision(machine.device, machine.weight_dtype),
        ),
        output_dir=str(save.output_dir),
        output_name=save.output_name,
        trained=(models.trainable.module,),
        in_use=in_use,
        rank=machine.rank,
        processes=machine.processes,
        trackers=trackers.open(machine.accelerator),
        barrier=machine.wait,
    )
