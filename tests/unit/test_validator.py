"""The loss on held-out images: which timesteps, which mean, by subset, over several processes, and when."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.data.records import MicroBatch, ResolvedDataset, SubsetSpec
from library.options import LossOptions, NoiseOptions, ValidationOptions
from library.training.clock import Clock
from library.training.report import Reporter
from library.training.validation import Probe, Validator, fixed_objectives
from tests.data_fixtures import cover_fit, dataset, record

LOSSES = {"a0": 1.0, "a1": 2.0, "a2": 6.0, "b0": 11.0}
REPORT: Any = SimpleNamespace()


def held_out() -> ResolvedDataset:
    """Three images of subset a, one of subset b."""
    records = [record(Path(f"{key}.png"), (64, 64), key=key, subset=int(key[0] == "b")) for key in LOSSES]
    made = dataset(records, [cover_fit((64, 64), (64, 64))] * len(records), subsets=2)
    subsets = (SubsetSpec(image_dir="photos/a"), SubsetSpec(image_dir="photos/b"))
    return replace(made, spec=replace(made.spec, subsets=subsets))


class Share:
    """One of several processes; what the others found is given."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, processes: int = 1, others: list[Any] | None = None) -> None:
        self.rank, self.processes, self.others = rank, processes, others or []

    def gather(self, value: list[tuple[str, float, int]]) -> list[list[tuple[str, float, int]]]:
        return [value, *self.others]


def make(
    share: Share | None = None, bad: str = "", **values: Any
) -> tuple[Validator, list[tuple[int, dict[str, float]]], list[str]]:
    logged: list[tuple[int, dict[str, float]]] = []
    seen: list[str] = []
    data = held_out()

    def load(micro: MicroBatch, rank: int, processes: int, moment: Any) -> Any:
        keys = [data.records[sample.record].key for sample in micro.samples]
        seen.extend(keys)
        weights = torch.tensor([float(key != bad) for key in keys])
        return SimpleNamespace(keys=keys, loss_weights_B=weights, network_multiplier=1.0)

    images: Any = SimpleNamespace(datasets=(data,), load=load)
    step: Any = SimpleNamespace(
        latents=lambda batch: None,
        losses=lambda batch, latents, factor: torch.tensor([factor * LOSSES[key] for key in batch.keys]),
    )
    trainable: Any = SimpleNamespace(on_micro_batch=lambda multiplier: None)
    objectives: Any = (0.5, 1.5)  # their mean is 1
    bar: Any = SimpleNamespace()
    reporter = Reporter(bar, 1, list, lambda scalars, at: logged.append((at, scalars)))
    probe = Probe(step, trainable, objectives, (), nullcontext)
    return Validator(ValidationOptions(**values), images, probe, share or Share(), reporter, 0), logged, seen


def test_timesteps_are_the_middles_of_equal_parts() -> None:
    for noise, times in (
        (NoiseOptions(), [100, 300, 500, 700, 900]),
        (NoiseOptions(min_timestep=200, max_timestep=300), [210, 230, 250, 270, 290]),
    ):
        found = [objective.noise for objective in fixed_objectives(noise, LossOptions())]
        assert [(one.min_timestep, one.max_timestep) for one in found] == [(time, time + 1) for time in times]


def test_each_image_counts_once_and_each_subset_has_its_mean() -> None:
    validator, logged, seen = make()
    validator.at_start(Clock(9, 3))
    assert sorted(seen) == sorted(LOSSES)
    assert logged == [(0, {"loss/validation": 5.0, "loss/validation/a": 3.0, "loss/validation/b": 11.0})]


def test_what_stands_in_for_a_bad_image_does_not_count() -> None:
    validator, _, _ = make(bad="a2")
    assert validator.measure() == {"a": (3.0, 2), "b": (11.0, 1)}
    only_b, logged, _ = make(bad="b0")
    only_b.at_end(Clock(9, 3, step=9))
    assert logged == [(9, {"loss/validation": 3.0})]


def test_processes_share_the_batches_and_put_their_losses_together() -> None:
    seen: list[str] = []
    for rank in range(2):
        validator, _, mine = make(Share(rank, 2))
        validator.measure()
        assert mine
        seen += mine
    assert sorted(seen) == sorted(LOSSES)
    validator, _, _ = make(Share(others=[[("b", 5.0, 1)]]))
    assert validator.measure() == {"a": (9.0, 3), "b": (16.0, 2)}


@pytest.mark.parametrize(
    ("values", "moments"),
    [({}, [0, 3, 6]), ({"validate_every_n_epochs": 2}, [0, 6]), ({"validate_every_n_steps": 4}, [0, 4, 6])],
)
def test_moments(values: dict[str, int], moments: list[int]) -> None:
    """Two epochs of three steps; the end is measured once, whatever else falls on it."""
    validator, logged, _ = make(**values)
    clock = Clock(max_train_steps=6, num_epochs=2)
    validator.at_start(clock)
    for _ in range(2):
        for _ in range(3):
            clock.advance()
            validator.after_step(clock, REPORT)
        validator.after_epoch(clock)
        clock.next_epoch()
    validator.at_end(clock)
    assert [step for step, _ in logged] == moments
