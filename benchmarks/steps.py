"""Optimizer steps of the trainer as a run makes them, on latents that are in memory already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from library.data.cache import FileState, LatentStore, target_of
from library.data.dataset import TrainImages
from library.data.records import (
    Batch,
    BucketRules,
    DatasetKind,
    DatasetSpec,
    Fit,
    ImageRecord,
    ResolvedDataset,
    StepPlan,
    SubsetSpec,
)
from library.diffusion.schedule import make_schedule
from library.options import LoopOptions
from library.options.settings import Settings
from library.training.clock import Clock
from library.training.guard import FiniteGuard
from library.training.loop import Job, train_step
from library.training.machine import Machine
from library.training.prepare import Models, make_step
from library.training.setup import make_arrangement, make_optimizer, make_update

IMAGES = 8
MANY_STEPS = 100_000
Forward = Callable[[Batch, int], Any]


def cached_images(latent_space: str, pixels: int, batch: int) -> TrainImages:
    """A data set of square pictures whose latents are in memory, all with one caption."""
    size = (pixels, pixels)
    fit = Fit(size, size, (0.0, 0.0, float(size[0]), float(size[1])), 0.0)
    records = tuple(
        ImageRecord(f"{index}.png", f"{index}.png", size, "a photo of a cat", 1, False, 0)
        for index in range(max(IMAGES, batch))
    )
    spec = DatasetSpec(DatasetKind.DREAMBOOTH, batch, BucketRules(size), (SubsetSpec("images"),))
    store = LatentStore(latent_space, "random")
    generator = torch.Generator().manual_seed(1)
    for record in records:
        latents_CHW = torch.randn(4, pixels // 8, pixels // 8, generator=generator)
        store.put(target_of(record, fit), FileState(0, 0), latents_CHW, None)
    return TrainImages((ResolvedDataset(spec, records, (fit,) * len(records)),), store, seed=1)


def optimizer_steps(
    settings: Settings, models: Models, machine: Machine, around: Callable[[Forward], Forward] | None = None
) -> Callable[[], object]:
    """A function that makes the next optimizer step. ``around`` may wrap the forward pass, to look at what it left."""
    arrangement, _ = make_arrangement(settings, models, machine, seed=1)
    clock = Clock(MANY_STEPS, 1)
    optimizer, facts = make_optimizer(settings, models, machine, clock)
    step = make_step(settings, models, machine, make_schedule())
    update = make_update(settings, models, machine, step, optimizer, facts)
    guard = FiniteGuard(settings[LoopOptions].on_nan, has_scaler=False)
    forward: Forward = around(update.step) if around else update.step
    batches, trainable = arrangement.batches, models.trainable
    job = Job(clock, forward, trainable, update, guard, arrangement.plan, batches, (), lambda: False, seed=1)
    trainable.on_epoch_start()

    def turns() -> Iterator[object]:
        for epoch in range(1, MANY_STEPS):
            plan: Sequence[StepPlan] = job.plan(epoch)
            ready = job.batches(plan, clock)
            for step_plan in plan:
                yield train_step(job, step_plan, ready)
                clock.advance()

    run = turns()
    return lambda: next(run)
