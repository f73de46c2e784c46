"""The one training loop. It knows no option: what varies lives in the trainable, the step and the effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from library.data.records import Batch, StepPlan
from library.rng import seed_of
from library.training.clock import Clock
from library.training.guard import FiniteGuard
from library.training.trainable import Trainable


@dataclass
class StepReport:
    """What one optimizer step did."""

    loss: float
    keys: tuple[str, ...]
    sample_count: int
    grad_norm: float
    was_skipped: bool = False
    scalars: dict[str, float] = field(default_factory=dict)


class Effect(Protocol):
    """Something that happens beside learning: saving, previews, reports."""

    def after_step(self, clock: Clock, report: StepReport) -> None: ...

    def after_epoch(self, clock: Clock) -> None: ...


class Update(Protocol):
    """Owns gradients: backward, clipping, optimizer and schedule."""

    def backward(self, loss: torch.Tensor) -> None: ...

    def sync(self, is_last: bool) -> Any: ...

    def total_norm(self) -> float: ...

    def apply(self) -> bool: ...

    def discard(self) -> None: ...


@dataclass
class Job:
    """Everything that the loop turns over. ``is_stopped``: a stop was asked for in one process; all ask at once."""

    clock: Clock
    step: Callable[[Batch, int], Any]
    trainable: Trainable
    update: Update
    guard: FiniteGuard
    plan: Callable[[int], Sequence[StepPlan]]
    batches: Callable[[Sequence[StepPlan], Clock], Iterator[Batch]]
    effects: tuple[Effect, ...]
    is_stopped: Callable[[], bool]
    seed: int
    rank: int = 0


def train(job: Job) -> None:
    """Run from where the clock stands to the end of the plan, or until a stop is asked for."""
    clock = job.clock
    while not (clock.is_finished or job.is_stopped()):
        plan = job.plan(clock.epoch)
        job.trainable.on_epoch_start()
        left = plan[clock.step_in_epoch : clock.step_in_epoch + clock.max_train_steps - clock.step]
        batches = job.batches(left, clock)
        for step_plan in left:
            report = train_step(job, step_plan, batches)
            clock.advance()
            for effect in job.effects:
                effect.after_step(clock, report)
            if job.is_stopped():
                break
        is_over = clock.step_in_epoch >= len(plan)
        if is_over or clock.is_finished:
            for effect in job.effects:
                effect.after_epoch(clock)
        if is_over and not clock.is_finished:  # the last epoch stays the one under way
            clock.next_epoch()


def train_step(job: Job, step_plan: StepPlan, batches: Iterator[Batch]) -> StepReport:
    """One optimizer step: the gradients of all its micro batches, the check, the update."""
    losses: list[torch.Tensor] = []
    keys: list[str] = []
    last = len(step_plan.micro_batches) - 1
    job.trainable.on_step_start(job.clock.step)
    for index in range(last + 1):
        batch = next(batches)
        torch.manual_seed(seed_of(job.seed, "step", job.clock.step, index, job.rank))  # dropout inside the models
        job.trainable.on_micro_batch(batch.network_multiplier)
        with job.update.sync(index == last):
            result = job.step(batch, step_plan.sample_count)
            job.update.backward(result.loss)
        losses.append(result.loss.detach())
        keys.extend(batch.keys)
    report = StepReport(
        loss=float(torch.stack(losses).sum()),
        keys=tuple(keys),
        sample_count=step_plan.sample_count,
        grad_norm=job.update.total_norm(),
    )
    if job.guard.is_good(report):
        report.was_skipped = not job.update.apply()
        report.scalars = job.trainable.after_update()
    else:
        job.update.discard()
        report.was_skipped = True
    return report
