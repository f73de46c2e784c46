"""The training loop with everything that it turns over replaced by notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from library.data.records import Batch, MicroBatch, Sample, StepPlan
from library.interrupt import StopRequest
from library.training.arrange import ImageArrangement
from library.training.clock import Clock
from library.training.guard import FiniteGuard
from library.training.loop import Job, train

MICROS, STEPS = 2, 3  # of a step, of an epoch


class Bench:
    """A run of epochs of 3 steps of 2 micro batches; ``notes`` is what happened, ``draws`` what dropout would draw."""

    def __init__(self, clock: Clock, rank: int = 0, bad: int = -1, stop_at: int = -1) -> None:
        self.notes: list[str] = []
        self.draws: list[float] = []
        self.losses: list[float] = []
        self.stop = StopRequest("stopping")
        self.bad, self.stop_at, self.clock = bad, stop_at, clock
        trainable: Any = SimpleNamespace(
            on_epoch_start=self._begin_epoch,
            on_step_start=lambda step: self.notes.append(f"step {step}"),
            on_micro_batch=lambda multiplier: None,
            after_update=lambda: {"norm": 1.0},
        )
        self.job = Job(
            clock=clock,
            step=self._step,
            trainable=trainable,
            update=self,
            guard=FiniteGuard("skip", has_scaler=False),
            plan=self._plan,
            batches=self._batches,
            effects=(self,),
            is_stopped=lambda: self.stop.is_set,
            seed=5,
            rank=rank,
        )

    def run(self) -> list[str]:
        train(self.job)
        return self.notes

    def _begin_epoch(self) -> None:
        assert len(self.notes) < 200, "the run does not end"
        self.notes.append(f"epoch {self.clock.epoch}")

    def _plan(self, epoch: int) -> Sequence[StepPlan]:
        return [
            StepPlan(tuple(MicroBatch(epoch, (Sample(MICROS * step + micro, 0),) * 2) for micro in range(MICROS)))
            for step in range(STEPS)
        ]

    def _batches(self, steps: Sequence[StepPlan], clock: Clock) -> Iterator[Batch]:
        for step in steps:
            for micro in step.micro_batches:
                name = f"{micro.dataset}.{micro.samples[0].record}"
                batch: Any = SimpleNamespace(keys=(name,), network_multiplier=1.0)
                yield batch

    def _step(self, batch: Batch, sample_count: int) -> Any:
        assert sample_count == 2 * MICROS
        self.draws.append(float(torch.rand(())))
        self.notes.append(batch.keys[0])
        return SimpleNamespace(loss=torch.tensor(float("nan") if self.clock.step == self.bad else 0.25))

    # ---- the update

    def sync(self, is_last: bool) -> Any:
        self.notes.append("sync" if is_last else "no sync")
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.notes.append("backward")

    def total_norm(self) -> float:
        return 1.0

    def apply(self) -> bool:
        self.notes.append("apply")
        return True

    def discard(self) -> None:
        self.notes.append("discard")

    # ---- the effect

    def after_step(self, clock: Clock, report: Any) -> None:
        self.notes.append(f"after step {clock.step}" + (" skipped" if report.was_skipped else ""))
        self.losses.append(report.loss)
        if clock.step == self.stop_at:
            self.stop.is_set = True

    def after_epoch(self, clock: Clock) -> None:
        self.notes.append(f"after epoch {clock.epoch}")


def only(notes: list[str], *words: str) -> list[str]:
    return [note for note in notes if note.startswith(words)]


def test_a_step_is_all_its_micro_batches_and_one_update() -> None:
    bench = Bench(Clock(max_train_steps=1, num_epochs=1))
    assert bench.run() == [
        *("epoch 1", "step 0", "no sync", "1.0", "backward", "sync", "1.1", "backward", "apply", "after step 1"),
        "after epoch 1",
    ]
    assert bench.losses == [0.5]  # each micro batch's loss is its share of the step's


def test_epochs_follow_each_other_and_the_last_may_be_short() -> None:
    notes = only(Bench(Clock(max_train_steps=5, num_epochs=2)).run(), "epoch", "after")
    first = ["epoch 1", "after step 1", "after step 2", "after step 3", "after epoch 1"]
    assert notes == [*first, "epoch 2", "after step 4", "after step 5", "after epoch 2"]


def test_a_resumed_run_goes_on_with_the_next_batch_and_the_same_draws() -> None:
    whole = Bench(Clock(max_train_steps=6, num_epochs=2))
    seen = only(whole.run(), "1.", "2.")
    for done in range(7):
        clock = Clock(max_train_steps=6, num_epochs=2)
        first = Bench(clock, stop_at=done)
        before = only(first.run(), "1.", "2.") if done else []
        again = Clock(max_train_steps=6, num_epochs=2)
        again.seek(clock.position())
        rest = Bench(again)
        after = only(rest.run(), "1.", "2.")
        assert before + after == seen
        assert len(before) == MICROS * done
        assert (first.draws if done else []) + rest.draws == whole.draws


def test_a_run_stopped_within_an_epoch_does_not_end_the_epoch() -> None:
    assert only(Bench(Clock(6, 2), stop_at=2).run(), "after") == ["after step 1", "after step 2"]
    assert only(Bench(Clock(6, 2), stop_at=3).run(), "after")[-1] == "after epoch 1"


def test_a_run_that_goes_on_from_the_last_step_of_an_epoch_ends_it_first() -> None:
    clock = Clock(6, 2)
    clock.seek({"epoch": 1, "step_in_epoch": STEPS, "step": STEPS})  # a state of that step, from before the epoch's end
    assert only(Bench(clock).run(), "epoch 2", "after")[:2] == ["after epoch 1", "epoch 2"]


def test_draws_of_steps_micro_batches_and_processes_are_different() -> None:
    benches = [Bench(Clock(6, 2), rank=rank) for rank in (0, 1)]
    for bench in benches:
        torch.manual_seed(1)  # the global state before has no part in it
        bench.run()
    assert len({*benches[0].draws, *benches[1].draws}) == 2 * 6 * MICROS


def test_a_step_that_is_not_finite_is_dropped_and_counted() -> None:
    bench = Bench(Clock(max_train_steps=3, num_epochs=1), bad=1)
    assert only(bench.run(), "apply", "discard", "after step") == [
        *("apply", "after step 1", "discard", "after step 2 skipped", "apply", "after step 3")
    ]


def test_captions_know_the_step_at_which_they_are_used() -> None:
    """Batches are loaded ahead, while the clock still stands at earlier steps."""
    seen: list[tuple[int, int, int]] = []

    def load(micro: MicroBatch, rank: int, processes: int, moment: Any) -> Any:
        seen.append((moment.epoch, moment.step, moment.max_train_steps))
        return SimpleNamespace(keys=(), network_multiplier=1.0)

    images: Any = SimpleNamespace(datasets=(), load=load)
    loop: Any = SimpleNamespace(gradient_accumulation_steps=MICROS)
    arrangement = ImageArrangement(images, 5, loop, 0, 0, 1)
    clock = Clock(9, 3, epoch=2, step_in_epoch=1, step=4)
    batches = arrangement.batches(Bench(clock).job.plan(2)[1:], clock)
    clock.advance()
    list(batches)
    assert seen == [(2, 4, 9), (2, 4, 9), (2, 5, 9), (2, 5, 9)]
