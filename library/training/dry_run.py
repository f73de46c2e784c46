"""``--dry_run``: the plan of a run, without loading a weight or encoding an image."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from library.data.plan import batches_per_epoch, training_visits
from library.data.records import ResolvedDataset
from library.data.report import describe
from library.data.text_cache import targets_of
from library.device import check_precision, choose_device
from library.families import family_for
from library.families.base import ModelFamily, ModelParts
from library.log import UserError
from library.options import (
    CacheOptions,
    DataOptions,
    EmaOptions,
    HubOptions,
    LoopOptions,
    ModelOptions,
    OptimizerOptions,
    PrecisionOptions,
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
)
from library.options.settings import Settings
from library.text.tokens import count_tokens
from library.training.arrange import count_steps, make_clock, warn_of_long_intervals
from library.training.clock import Clock, due_counts
from library.training.disk import megabytes, output_bytes
from library.training.lr import create_schedule
from library.training.machine import process_count
from library.training.metadata import model_facts
from library.training.optimizers import create_optimizer
from library.training.output import full_fingerprint, refuse_another_run
from library.training.preflight import check_bucket_steps, free_bytes
from library.training.preview import first_prompts
from library.training.rates import table, table_lines
from library.training.saving import SavePlan
from library.training.script import Script
from library.training.setup import find_state
from library.training.state import RunState, read_run
from library.training.text_caching import layout_of, text_cache_options
from library.training.text_source import text_settings
from library.training.trainable import Trainable

logger = logging.getLogger(__name__)
_SHOWN = 6  # counts of a long list that are printed at each of its ends
_LATENT_BYTES_PER_PIXEL = 4 * 4 / 64  # four float32 channels for each 8x8 pixels


def print_plan(
    script: Script, settings: Settings, datasets: Sequence[ResolvedDataset], held_out: Sequence[ResolvedDataset]
) -> int:
    """Print the plan to standard output; returns the exit status. ``held_out`` are the images of the validation."""
    if not datasets:
        raise UserError("--dry_run plans runs on images; a --dataset_class only knows its batches")
    _warn_of_this_machine(settings)
    clock = make_clock(count_steps(datasets, settings[LoopOptions], process_count()), settings[LoopOptions])
    warn_of_long_intervals(settings, clock)
    family = family_for(settings[ModelOptions], settings.family)
    check_bucket_steps(family, datasets)
    # what would learn, on models without weights
    parts = family.outline(settings[ModelOptions], token=settings[HubOptions].huggingface_token)
    trainable = script.load_kind()(settings, family, parts)
    trainable.require_multipliers(dataset.spec.network_multiplier for dataset in (*datasets, *held_out))
    resumed = _refuse_what_resume_would(settings, datasets, family, parts)
    sections = {
        "Data": [*_data_lines(settings, datasets), *_held_out_lines(held_out)],
        "Steps": [*_step_lines(settings, datasets, clock), *_resume_lines(resumed)],
        "Learning rates": _rate_lines(settings, trainable, clock),
        "Files": _file_lines(settings, clock),
        "Disk": _disk_lines(settings, datasets, parts, trainable, clock),
    }
    for title, lines in sections.items():
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    return 0


def _warn_of_this_machine(settings: Settings) -> None:
    """What stops a run here; a plan is also made for another machine, so it stops no plan."""
    try:
        check_precision(settings[PrecisionOptions], choose_device())
    except UserError as error:
        for line in str(error).splitlines():
            logger.warning("a run on this machine would be refused: %s", line)


def _refuse_what_resume_would(
    settings: Settings, datasets: Sequence[ResolvedDataset], family: ModelFamily, parts: ModelParts
) -> RunState | None:
    """The state to go on from, if there is one. Raises UserError if it is damaged, or of another run."""
    folder = find_state(settings)
    if folder is None:
        return None
    resumed = read_run(folder)
    given = settings[LoopOptions].seed
    # images that are left out because they cannot be decoded are not known yet
    known = () if settings[DataOptions].on_bad_image == "skip" else datasets
    facts = model_facts(family, parts)
    mark = full_fingerprint(settings, resumed.seed if given is None else given, known, facts, process_count())
    for line in refuse_another_run(settings, resumed, mark):
        logger.warning("it differs from the state: %s", line)
    return resumed


def _resume_lines(resumed: RunState | None) -> list[str]:
    return [] if resumed is None else [f"goes on after step {resumed.step} of the state"]


def _data_lines(settings: Settings, datasets: Sequence[ResolvedDataset]) -> list[str]:
    limit = settings[ModelOptions].max_token_length or 75
    reports = describe(datasets, count_tokens, limit, process_count())
    return [line for report in reports for line in report.lines()]


def _held_out_lines(held_out: Sequence[ResolvedDataset]) -> list[str]:
    count = sum(len(dataset.records) for dataset in held_out)
    return [f"{count} images held out for validation"] if count else []


def _step_lines(settings: Settings, datasets: Sequence[ResolvedDataset], clock: Clock) -> list[str]:
    loop = settings[LoopOptions]
    visits = sum(training_visits(dataset) for dataset in datasets)
    processes = process_count()
    batches = batches_per_epoch(datasets, processes)
    per_epoch = -(-batches // loop.gradient_accumulation_steps)
    return [
        f"{visits} image visits per epoch (images x repeats)",
        f"{batches} batches per epoch{f' of {processes} processes' if processes > 1 else ''}",
        f"{per_epoch} optimizer steps per epoch ({loop.gradient_accumulation_steps} batches each)",
        f"{clock.max_train_steps} optimizer steps in {clock.num_epochs} epochs",
    ]


def _rate_lines(settings: Settings, trainable: Trainable, clock: Clock) -> list[str]:
    optimizer, name = create_optimizer(settings[OptimizerOptions], trainable.parameter_groups(), torch.device("cpu"))
    rows = table(settings[ScheduleOptions], optimizer, clock.max_train_steps)
    create_schedule(settings[ScheduleOptions], optimizer, clock.max_train_steps)  # for what it warns of
    return [f"optimizer {name}", *table_lines(rows)]


def _file_lines(settings: Settings, clock: Clock) -> list[str]:
    plan, sample = SavePlan.of(settings[SaveOptions], clock.num_epochs), settings[SampleOptions]
    epochs, steps = plan.epoch_saves(clock.num_epochs), plan.step_saves(clock.max_train_steps)
    by_epoch = sample.sample_every_n_epochs is not None
    drawn_epochs = due_counts(clock.num_epochs - 1, sample.sample_every_n_epochs)
    drawn_steps = due_counts(clock.max_train_steps - 1, None if by_epoch else sample.sample_every_n_steps)
    state = "with a state each" if plan.with_state else "without states"
    last_state = " and a state" if plan.state_at_end else ""
    average = "; beside each model the average of the weights" if settings[EmaOptions].ema_decay else ""
    return [
        f"models after epochs: {_counts(epochs)}; after steps: {_counts(steps)} ({state}){average}",
        f"at the end: the final model{last_state}",
        f"previews {'before the first step; ' if sample.sample_at_first else ''}"
        f"after epochs: {_counts(drawn_epochs)}; after steps: {_counts(drawn_steps)}; at the end"
        if first_prompts(sample)
        else "no previews",
    ]


def _disk_lines(
    settings: Settings, datasets: Sequence[ResolvedDataset], parts: ModelParts, trainable: Trainable, clock: Clock
) -> list[str]:
    needed = output_bytes(settings, trainable, clock)
    if settings[CacheOptions].cache_latents_to_disk:
        needed["latents"] = int(sum(_latent_bytes(dataset) for dataset in datasets))
    text = text_cache_options(settings)
    if text.cache_text_encoder_outputs_to_disk:
        family = family_for(settings[ModelOptions], settings.family)
        layout = layout_of(parts.spec.text_encoders, text_settings(settings[ModelOptions], family))
        targets = targets_of(datasets, text.cache_text_encoder_outputs_variants or 0, to_disk=True)
        needed["text encoder outputs"] = layout.size_bytes * sum(len(one.texts) for one in targets if one.on_disk)
    free = free_bytes(str(settings[SaveOptions].output_dir))
    lines = [f"{name}: {megabytes(size)}" for name, size in needed.items() if size]
    enough = "" if sum(needed.values()) < free else " - NOT ENOUGH"
    return [*lines, f"needed in all: about {megabytes(sum(needed.values()))}, free: {megabytes(free)}{enough}"]


def _latent_bytes(dataset: ResolvedDataset) -> float:
    total = 0.0
    for record, fit in zip(dataset.records, dataset.fits, strict=True):
        copies = 2 if dataset.subset_of(record).augmentation.flip_aug else 1
        total += fit.bucket[0] * fit.bucket[1] * _LATENT_BYTES_PER_PIXEL * copies
    return total


def _counts(counts: Iterable[int]) -> str:
    listed = list(counts)
    if len(listed) <= 2 * _SHOWN:
        return ", ".join(map(str, listed)) or "none"
    ends = (", ".join(map(str, part)) for part in (listed[:_SHOWN], listed[-_SHOWN:]))
    return f"{' ... '.join(ends)} ({len(listed)} in all)"
