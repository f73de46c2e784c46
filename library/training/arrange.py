"""How the data become optimizer steps: totals, the plan of each epoch, and the stream of batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from library.data.dataset import TrainImages
from library.data.loader import prefetch
from library.data.plan import plan_epoch, steps_of_epochs, steps_per_epoch
from library.data.records import Batch, CaptionClock, MicroBatch, ResolvedDataset, StepPlan
from library.options import LoopOptions
from library.training.clock import Clock


def make_clock(datasets: Sequence[ResolvedDataset], loop: LoopOptions, processes: int) -> Clock:
    """The plan of the whole run: steps from epochs, or epochs from steps."""
    accumulation = loop.gradient_accumulation_steps
    if loop.max_train_epochs:
        steps = steps_of_epochs(datasets, processes, accumulation, loop.max_train_epochs)
        return Clock(max_train_steps=steps, num_epochs=loop.max_train_epochs)
    each = steps_per_epoch(datasets, processes, accumulation)
    epochs = -(-loop.max_train_steps // each)
    while steps_of_epochs(datasets, processes, accumulation, epochs) < loop.max_train_steps:
        epochs += 1
    return Clock(max_train_steps=loop.max_train_steps, num_epochs=epochs)


class Arrangement:
    """Epoch plans and batches of one process. Everything is a function of (seed, epoch), so resume needs no replay."""

    def __init__(
        self, images: TrainImages, seed: int, accumulation: int, max_workers: int, rank: int, processes: int
    ) -> None:
        self._images = images
        self._seed = seed
        self._accumulation = accumulation
        self._rank = rank
        self._processes = processes
        self._workers = min(max_workers, os.cpu_count() or 1) if images.reads_files() else 0

    def plan(self, epoch: int) -> tuple[StepPlan, ...]:
        """The optimizer steps of an epoch."""
        return plan_epoch(self._images.datasets, self._seed, epoch, self._processes, self._accumulation)

    def batches(self, steps: Sequence[StepPlan], clock: Clock) -> Iterator[Batch]:
        """This process's batches of the steps that are left in the epoch under way."""
        epoch, first, total = clock.epoch, clock.step, clock.max_train_steps
        jobs = (
            (micro, CaptionClock(epoch=epoch, step=first + index, max_train_steps=total))
            for index, step in enumerate(steps)
            for micro in step.micro_batches
        )
        return prefetch(jobs, self._load, self._workers)

    def _load(self, job: tuple[MicroBatch, CaptionClock]) -> Batch:
        micro, clock = job
        return self._images.load(micro, self._rank, self._processes, clock)
