"""How the data become optimizer steps: totals, the plan of each epoch, and the stream of batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from library.data.dataset import TrainImages
from library.data.loader import prefetch
from library.data.plan import plan_epoch, steps_of_epochs
from library.data.records import Batch, CaptionClock, MicroBatch, ResolvedDataset, Sample, StepPlan
from library.data.user_dataset import UserDataset
from library.options import LoopOptions
from library.options.settings import Settings
from library.training.clock import Clock

logger = logging.getLogger(__name__)


class StepCount(Protocol):
    """Optimizer steps of the first ``epochs`` epochs."""

    def __call__(self, epochs: int) -> int: ...


def count_steps(datasets: Sequence[ResolvedDataset], loop: LoopOptions, processes: int) -> StepCount:
    """The counter for data sets of images."""
    return lambda epochs: steps_of_epochs(datasets, processes, loop.gradient_accumulation_steps, epochs)


def make_clock(steps_of: StepCount, loop: LoopOptions) -> Clock:
    """The plan of the whole run: steps from epochs, or epochs from steps."""
    if loop.max_train_epochs:
        return Clock(max_train_steps=steps_of(loop.max_train_epochs), num_epochs=loop.max_train_epochs)
    epochs = max(1, loop.max_train_steps // steps_of(1))
    while steps_of(epochs) < loop.max_train_steps:
        epochs += 1
    return Clock(max_train_steps=loop.max_train_steps, num_epochs=epochs)


def warn_of_long_intervals(settings: Settings, clock: Clock) -> None:
    """Name the options that ask for something less often than the run is long: it would never happen."""
    lengths = {"steps": clock.max_train_steps, "epochs": clock.num_epochs}
    for what in ("save", "sample", "validate"):
        for unit, length in lengths.items():
            every = settings.value_of(f"{what}_every_n_{unit}")
            if every is not None and every > length:
                logger.warning("--%s_every_n_%s %d has no effect: the run has %d %s", what, unit, every, length, unit)


class Arrangement(Protocol):
    """Epoch plans and batches of one process. Everything is a function of (seed, epoch), so resume needs no replay."""

    def plan(self, epoch: int) -> tuple[StepPlan, ...]:
        """The optimizer steps of an epoch."""
        ...

    def batches(self, steps: Sequence[StepPlan], clock: Clock) -> Iterator[Batch]:
        """This process's batches of the steps that are left in the epoch under way."""
        ...


def _jobs(steps: Sequence[StepPlan], clock: Clock) -> Iterator[tuple[MicroBatch, CaptionClock]]:
    """Each micro batch with the moment at which it will be used, which is not that at which it is loaded."""
    epoch, first, total = clock.epoch, clock.step, clock.max_train_steps
    return (
        (micro, CaptionClock(epoch=epoch, step=first + index, max_train_steps=total))
        for index, step in enumerate(steps)
        for micro in step.micro_batches
    )


class ImageArrangement:
    """The arrangement of the built-in data sets."""

    def __init__(
        self, images: TrainImages, seed: int, loop: LoopOptions, max_workers: int, rank: int, processes: int
    ) -> None:
        self._images = images
        self._seed = seed
        self._accumulation = loop.gradient_accumulation_steps
        self._rank = rank
        self._processes = processes
        reads_files = not all(images.in_memory(index) for index in range(len(images.datasets)))
        self._workers = min(max_workers, os.cpu_count() or 1) if reads_files else 0

    def plan(self, epoch: int) -> tuple[StepPlan, ...]:
        """See `Arrangement`."""
        return plan_epoch(self._images.datasets, self._seed, epoch, self._processes, self._accumulation)

    def batches(self, steps: Sequence[StepPlan], clock: Clock) -> Iterator[Batch]:
        """See `Arrangement`."""
        return prefetch(
            _jobs(steps, clock),
            lambda job: self._images.load(job[0], self._rank, self._processes, job[1]),
            self._workers,
        )


class UserArrangement:
    """The arrangement of a data set of the user's own (``--dataset_class``): its batches in their order.

    Process r of P takes batch kP + r in turn k; the last turn wraps around to the first batches.
    """

    def __init__(
        self, dataset: UserDataset, loop: LoopOptions, batch_size: int, max_workers: int, rank: int, processes: int
    ) -> None:
        self._dataset = dataset
        self._accumulation = loop.gradient_accumulation_steps
        self._batch_size = batch_size
        self._workers = min(max_workers, os.cpu_count() or 1)
        self._rank = rank
        self._processes = processes

    def count_steps(self, epochs: int) -> int:
        """Optimizer steps of so many epochs."""
        return epochs * len(self.plan(1))

    def plan(self, epoch: int) -> tuple[StepPlan, ...]:
        """See `Arrangement`. A sample stands for its batch's number here."""
        turns = range(-(-len(self._dataset) // self._processes))
        size = self._batch_size * self._processes
        micros = [MicroBatch(0, (Sample(turn, 0),) * size) for turn in turns]
        cuts = range(0, len(micros), self._accumulation)
        return tuple(StepPlan(tuple(micros[cut : cut + self._accumulation])) for cut in cuts)

    def batches(self, steps: Sequence[StepPlan], clock: Clock) -> Iterator[Batch]:
        """See `Arrangement`."""
        return prefetch(_jobs(steps, clock), lambda job: self._load(*job), self._workers)

    def _load(self, micro: MicroBatch, clock: CaptionClock) -> Batch:
        number = micro.samples[0].record * self._processes + self._rank
        return self._dataset.load(number % len(self._dataset), clock)
