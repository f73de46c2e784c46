"""Builds everything that a training run turns over, in the order in which it can fail: cheap checks first, models
last.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.data.records import ResolvedDataset
from library.data.user_dataset import load_user_dataset
from library.device import describe
from library.diffusion.schedule import make_schedule
from library.hub import Uploader, download_state
from library.interrupt import StopRequest
from library.log import Progress, progress
from library.options import (
    DataOptions,
    EmaOptions,
    HubOptions,
    LoopOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
    SaveOptions,
    ScheduleOptions,
)
from library.options.settings import Settings
from library.rng import fresh_seed
from library.training.arrange import (
    Arrangement,
    ImageArrangement,
    StepCount,
    UserArrangement,
    count_steps,
    make_clock,
    warn_of_long_intervals,
)
from library.training.average import WeightAverage, make_average
from library.training.clock import Clock
from library.training.disk import warn_of_full_disk
from library.training.fingerprint import fingerprint
from library.training.fused import FusedUpdate
from library.training.guard import FiniteGuard
from library.training.loop import Job
from library.training.lr import Schedule, create_schedule
from library.training.machine import Machine, open_machine
from library.training.metadata import model_facts
from library.training.optimizers import OptimizerMode, create_optimizer
from library.training.output import OptimizerFacts, Output, identify, open_uploader, refuse_another_run
from library.training.prepare import Models, load_models, make_previewer, make_step, make_validator
from library.training.preview import Previewer
from library.training.rates import learning_rates, table, table_lines
from library.training.report import Reporter
from library.training.script import Script
from library.training.state import RunState, read_run
from library.training.step import TrainStep
from library.training.text_source import text_settings
from library.training.trackers import Trackers
from library.training.update import WeightUpdate
from library.training.validation import Validator

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is ready to start."""

    job: Job
    clock: Clock
    output: Output
    previewer: Previewer
    validator: Validator | None
    trackers: Trackers
    bar: Progress[int]


def build_run(
    script: Script,
    settings: Settings,
    datasets: Sequence[ResolvedDataset],
    held_out: Sequence[ResolvedDataset],
    stop: StopRequest,
) -> Run:
    """Everything up to the first step. ``held_out`` are the images of the validation."""
    trackers = Trackers(settings, script.tracker_name)
    machine = open_machine(settings, trackers)
    uploader = open_uploader(settings[HubOptions], machine)
    state_folder = find_state(settings)
    resumed = read_run(state_folder) if state_folder else None
    seed = choose_seed(settings, machine, resumed)
    if resumed:  # options first: no model has to be read for them
        refuse_another_run(settings, resumed, fingerprint({**settings.as_flat_dict(), "seed": seed}))
    models = load_models(script, settings, datasets, held_out, machine, seed)
    arrangement, steps_of = make_arrangement(settings, models, machine, seed)
    clock = make_clock(steps_of, settings[LoopOptions])
    _log_plan(clock, machine)
    warn_of_long_intervals(settings, clock)
    warn_of_full_disk(settings, models.trainable, clock)
    schedule = make_schedule(models.parts.prediction_type, settings[NoiseOptions].zero_terminal_snr).to(machine.device)
    optimizer, facts = make_optimizer(settings, models, machine, clock)
    step = make_step(settings, models, machine, schedule)
    update = make_update(settings, models, machine, step, optimizer, facts)
    bar = progress(clock.max_train_steps, "steps")
    reporter = Reporter(bar, len(arrangement.plan(1)), lambda: learning_rates(optimizer), trackers.log)
    mode = OptimizerMode(optimizer)
    average = make_average(
        settings[EmaOptions], models.trainable.trained_parameters(), optimizer_averages=mode.averages
    )
    output = make_output(settings, models, machine, clock, reporter, facts, seed, resumed, uploader, average)
    if state_folder and resumed:
        output.restore(state_folder, resumed)
    trackers.start(settings, machine.accelerator)
    validator = make_validator(settings, models, machine, step, reporter, mode.evaluating)
    in_use = average.in_use if average and settings[EmaOptions].sample_with_ema else mode.evaluating
    previewer = make_previewer(settings, models, machine, schedule, trackers, in_use)
    job = Job(
        clock=clock,
        step=update.step,
        trainable=models.trainable,
        update=update,
        guard=FiniteGuard(settings[LoopOptions].on_nan, machine.accelerator.scaler is not None, models.images.path_of),
        plan=arrangement.plan,
        batches=arrangement.batches,
        effects=tuple(effect for effect in (average, reporter, validator, output.saver, previewer) if effect),
        is_stopped=lambda: machine.any(stop.is_set),
        seed=seed,
        rank=machine.rank,
    )
    return Run(job, clock, output, previewer, validator, trackers, bar)


def find_state(settings: Settings) -> str | None:
    """The folder to resume from, fetched from the hub if it is there."""
    resume, hub = settings[SaveOptions].resume, settings[HubOptions]
    if resume and hub.resume_from_huggingface:
        return str(download_state(resume, hub.huggingface_token))
    return resume


def choose_seed(settings: Settings, machine: Machine, resumed: RunState | None) -> int:
    """The run's seed: given, or that of the run being resumed, or drawn; the same in all processes."""
    given = settings[LoopOptions].seed
    if given is not None:
        return given
    if resumed is not None:
        return resumed.seed
    seed = int(machine.agree(fresh_seed()))
    logger.info("seed %d (give it with --seed to repeat this run)", seed)
    return seed


def make_arrangement(settings: Settings, models: Models, machine: Machine, seed: int) -> tuple[Arrangement, StepCount]:
    """The order of the data in this process, and how many steps its epochs have."""
    loop, data = settings[LoopOptions], settings[DataOptions]
    workers = data.max_data_loader_n_workers
    if data.dataset_class:
        own = load_user_dataset(
            data.dataset_class, resolution=data.resolution, batch_size=data.train_batch_size, seed=seed
        )
        arranged = UserArrangement(own, loop, data.train_batch_size, workers, machine.rank, machine.processes)
        return arranged, arranged.count_steps
    images = ImageArrangement(models.images, seed, loop, workers, machine.rank, machine.processes)
    return images, count_steps(models.images.datasets, loop, machine.processes)


def _log_plan(clock: Clock, machine: Machine) -> None:
    others = f", {machine.processes} processes" if machine.processes > 1 else ""
    steps, epochs = clock.max_train_steps, clock.num_epochs
    logger.info("%d steps in %d epochs on %s%s", steps, epochs, describe(machine.device), others)


def make_optimizer(settings: Settings, models: Models, machine: Machine, clock: Clock) -> tuple[Any, OptimizerFacts]:
    """The optimizer over what learns, with its schedule and the name that is recorded."""
    optimizer, name = create_optimizer(
        settings[OptimizerOptions],
        models.trainable.parameter_groups(),
        machine.device,
        loss_scaling=machine.accelerator.scaler is not None,
    )
    for line in table_lines(table(settings[ScheduleOptions], optimizer, clock.max_train_steps)):
        logger.info("%s", line)
    schedule: Schedule = create_schedule(settings[ScheduleOptions], optimizer, clock.max_train_steps)
    return optimizer, OptimizerFacts(optimizer, schedule, name)


def make_update(
    settings: Settings, models: Models, machine: Machine, step: TrainStep, optimizer: Any, facts: OptimizerFacts
) -> WeightUpdate | FusedUpdate:
    """Step and optimizer as accelerate wraps them, with the schedule; or the optimizer in the backward pass."""
    trainable = models.trainable
    max_grad_norm = settings[OptimizerOptions].max_grad_norm
    if settings.value_of("fused_backward_pass"):
        return FusedUpdate(machine.accelerator, step.to(machine.device), optimizer, facts.schedule, max_grad_norm)
    clip_skip = text_settings(settings[ModelOptions], models.family).clip_skip
    skips_layers = models.text_learns and (clip_skip or 1) > 1  # the last ones get no gradient
    wrapped = machine.wrap(step, optimizer, may_skip_parameters=trainable.may_skip_parameters or skips_layers)
    return WeightUpdate(
        machine.accelerator,
        *wrapped,
        facts.schedule,
        trainable.trained_parameters(),
        max_grad_norm,
    )


def make_output(
    settings: Settings,
    models: Models,
    machine: Machine,
    clock: Clock,
    reporter: Reporter,
    optimizer: OptimizerFacts,
    seed: int,
    resumed: RunState | None,
    uploader: Uploader | None,
    average: WeightAverage | None,
) -> Output:
    """What writes, after the run was found to be the one that is resumed."""
    model = model_facts(models.family, models.parts)
    datasets = models.images.datasets
    identity = identify(settings, seed, datasets, model, machine.processes, resumed)
    return Output(
        settings, machine, models.trainable, identity, model, datasets, clock, reporter, optimizer, uploader, average
    )
