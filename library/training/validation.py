"""Effect: the loss on images that are never trained on (see held_out.py).

The images, their noise and their timesteps are the same at each measurement and do not depend on the run's seed, so the
numbers of a run, and of runs with other settings of the optimizer, can be compared.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from library.data.dataset import NoImageLeft, TrainImages
from library.data.loader import prefetch
from library.data.plan import plan_epoch
from library.data.records import Batch, CaptionClock, MicroBatch, ResolvedDataset
from library.diffusion.objective import Objective
from library.diffusion.schedule import TIMESTEPS
from library.log import progress
from library.options import LossOptions, NoiseOptions, ValidationOptions
from library.training.clock import Clock, is_due
from library.training.loop import StepReport
from library.training.preview import evaluating, untouched_random_states
from library.training.report import Reporter
from library.training.step import TrainStep
from library.training.trainable import Trainable

logger = logging.getLogger(__name__)

POINTS = 5
QUIET_SECONDS = 2.0  # a validation that takes longer shows how far it is
_CLOCK = CaptionClock(epoch=1, step=0, max_train_steps=1)  # captions are those of no moment of the run


class Share(Protocol):
    """This process among the others."""

    @property
    def rank(self) -> int: ...
    @property
    def processes(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def gather(self, value: list[tuple[str, float, int]]) -> list[list[tuple[str, float, int]]]:
        """The values of all processes in their order."""
        ...


@dataclass(frozen=True)
class Probe:
    """What is measured with: the step of the training, at fixed timesteps, with the weights that would be saved.

    ``modules`` are put in eval mode meanwhile; ``weights`` puts the weights in place.
    """

    step: TrainStep
    trainable: Trainable
    objectives: tuple[Objective, ...]
    modules: tuple[nn.Module, ...]
    weights: Callable[[], AbstractContextManager[object]]


def fixed_objectives(noise: NoiseOptions, loss: LossOptions) -> tuple[Objective, ...]:
    """The run's objective at timesteps in the middles of `POINTS` equal parts of its range."""
    low, high = noise.min_timestep or 0, TIMESTEPS if noise.max_timestep is None else noise.max_timestep
    times = [low + (2 * point + 1) * (high - low) // (2 * POINTS) for point in range(POINTS)]
    return tuple(Objective(replace(noise, min_timestep=time, max_timestep=time + 1), loss) for time in times)


class Validator:
    """Measures the loss on held-out images when it is due, without a trace in the training.

    Before the first step, at the given interval (each epoch when none is given), and at the end. All processes take
    part. What is found goes to the reporter as loss/validation, and with several subsets as loss/validation/<subset>.
    If no held-out image can be used, that is said once and nothing is measured any more.
    """

    def __init__(
        self,
        options: ValidationOptions,
        images: TrainImages,
        probe: Probe,
        share: Share,
        reporter: Reporter,
        workers: int,
    ) -> None:
        self._every_n_steps = options.validate_every_n_steps
        self._every_n_epochs = options.validate_every_n_epochs or (None if self._every_n_steps else 1)
        self._images = images
        self._probe = probe
        self._share = share
        self._reporter = reporter
        self._workers = workers
        plan = plan_epoch(images.datasets, options.validation_seed, 1, 1, 1)
        batches = [micro for step in plan for micro in step.micro_batches][: options.max_validation_steps]
        self._batches = batches[share.rank :: share.processes]
        self._labels = _labels(images.datasets)
        self._is_blind = False

    def at_start(self, clock: Clock) -> None:
        """Before the first step; a resumed run had it already."""
        if clock.step == 0:
            self._report(clock)

    def after_step(self, clock: Clock, report: StepReport) -> None:
        """After each optimizer step."""
        if is_due(clock.step, self._every_n_steps):
            self._report(clock)

    def after_epoch(self, clock: Clock) -> None:
        """At the end of each epoch, while ``clock.epoch`` still names it."""
        if is_due(clock.epoch, self._every_n_epochs):
            self._report(clock)

    def at_end(self, clock: Clock) -> None:
        """When all steps are done."""
        self._report(clock)

    def _report(self, clock: Clock) -> None:
        if self._is_blind or self._reporter.validated_at == clock.step:
            return
        found = self.measure()
        if not found:
            self._is_blind = True
            logger.warning("no held-out image can be used: there is no validation")
            return
        scalars = {"loss/validation": _mean(found.values())}
        if len(found) > 1:
            scalars |= {f"loss/validation/{name}": _mean([one]) for name, one in found.items()}
        self._reporter.add_validation(clock.step, scalars)

    @torch.no_grad()
    def measure(self) -> dict[str, tuple[float, int]]:
        """Sum of the losses and number of the images, by subset; each loss is the mean over the fixed timesteps.

        Subsets of which no image was measured are not there.
        """
        own: list[tuple[str, float, int]] = []
        probe = self._probe
        with (
            evaluating(probe.modules),
            untouched_random_states(self._share.device),
            probe.weights(),
            progress(len(self._batches), "validation", quiet_seconds=QUIET_SECONDS) as bar,
        ):
            for batch in prefetch(self._batches, self._load, self._workers):
                if batch is not None:
                    own += self._losses(batch)
                bar.advance(images=len(batch.keys) if batch else 0)
        found: dict[str, tuple[float, int]] = {}
        rows = [row for rows in self._share.gather(own) for row in rows]
        for name in dict.fromkeys(self._labels.values()):
            counted = [(loss, count) for label, loss, count in rows if label == name and count]
            if counted:
                found[name] = (sum(loss for loss, _ in counted), sum(count for _, count in counted))
        return found

    def _load(self, micro: MicroBatch) -> Batch | None:
        """A batch; None if none of its images can be used (which was said of each)."""
        try:
            return self._images.load(micro, 0, 1, _CLOCK)
        except NoImageLeft:
            return None

    def _losses(self, batch: Batch) -> list[tuple[str, float, int]]:
        """The subset, loss and number of each image."""
        probe = self._probe
        probe.trainable.on_micro_batch(batch.network_multiplier)
        latents_BCHW = probe.step.latents(batch)
        losses = [probe.step.losses(batch, latents_BCHW, objective) for objective in probe.objectives]
        means = torch.stack(losses).mean(dim=0).tolist()
        # an image that cannot be read any more is replaced by another one of weight 0
        counts = [int(weight != 0) for weight in batch.loss_weights_B.tolist()]
        return list(zip((self._labels[key] for key in batch.keys), means, counts, strict=True))


def _mean(sums: Iterable[tuple[float, int]]) -> float:
    """Of sums and counts, which are not all 0."""
    total, count = (sum(column) for column in zip(*sums, strict=True))
    return total / count


def _labels(datasets: Sequence[ResolvedDataset]) -> dict[str, str]:
    """The name of its subset for each image's key: the folder or file without its path, numbered if it is not alone."""
    names = dict.fromkeys(dataset.subset_of(record).name for dataset in datasets for record in dataset.records)
    labels: dict[str, str] = {}
    for name in names:
        base = os.path.basename(os.path.normpath(name))
        same = sum(os.path.basename(os.path.normpath(other)) == base for other in labels)
        labels[name] = f"{base} ({same + 1})" if same else base
    return {record.key: labels[dataset.subset_of(record).name] for dataset in datasets for record in dataset.records}
