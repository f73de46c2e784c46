"""What a run writes: models with their metadata, states, uploads, and the short report at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from library.checkpoint.hashes import file_hashes
from library.data.facts import metadata_facts
from library.data.plan import batches_per_epoch
from library.data.records import ResolvedDataset
from library.device import save_dtype
from library.hub import Uploader
from library.log import UserError
from library.options import HubOptions, SaveOptions
from library.options.settings import Settings
from library.training.average import WeightAverage
from library.training.clock import Clock
from library.training.fingerprint import data_facts, differences, fingerprint
from library.training.lr import Schedule
from library.training.machine import Machine
from library.training.metadata import ModelFacts, RunFacts, build_metadata, commit_hash, new_session
from library.training.optimizers import OptimizerMode, uses_relative_step
from library.training.report import Reporter
from library.training.saving import Saved, SavePlan, Saver
from library.training.state import RunState, load_state, save_state
from library.training.trainable import Trainable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerFacts:
    """The optimizer and its schedule, and what metadata record of it."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    recorded_name: str


@dataclass(frozen=True)
class Identity:
    """What makes a logical run the same through all its sessions."""

    session_id: int
    started_at: float
    seed: int
    fingerprint: dict[str, Any]


def identify(
    settings: Settings,
    seed: int,
    datasets: Sequence[ResolvedDataset],
    model: ModelFacts,
    processes: int,
    resumed: RunState | None,
) -> Identity:
    """The identity of this run. A resumed one must be the same run: raises UserError that lists what differs, unless
    ``--allow_mismatch`` was given.
    """
    mark = full_fingerprint(settings, seed, datasets, model, processes)
    if resumed is None:
        session_id, started_at = new_session(seed)
        return Identity(session_id, started_at, seed, mark)
    for line in refuse_another_run(settings, resumed, mark):
        logger.warning("resumed although it differs: %s", line)
    return Identity(resumed.session_id, resumed.started_at, seed, mark)


def full_fingerprint(
    settings: Settings, seed: int, datasets: Sequence[ResolvedDataset], model: ModelFacts, processes: int
) -> dict[str, Any]:
    """What a state records of a run: options, data, and the contents of all model files that it begins from."""
    one_each, several = ("network_weights", "controlnet_model_name_or_path"), ("base_weights", "weights")
    files = [settings.value_of(name) for name in one_each]
    files += [file for name in several for file in settings.value_of(name) or ()]
    hashes = {
        "base model": model.hashes and model.hashes.sha256,
        "VAE": model.vae_hashes and model.vae_hashes.sha256,
        "networks": [file_hashes(file).sha256 for file in files if file],
    }
    data = {**data_facts(datasets), "processes": processes}
    return fingerprint({**settings.as_flat_dict(), "seed": seed}, data, hashes)


def refuse_another_run(settings: Settings, resumed: RunState, mark: dict[str, Any]) -> list[str]:
    """What differs between a run's fingerprint (or a part of it) and the state's, if ``--allow_mismatch`` lets it pass.
    Raises UserError with the list otherwise.
    """
    found = differences(resumed.fingerprint, mark)
    if found and not settings[SaveOptions].allow_mismatch:
        said = "--resume: this is not the run that the state belongs to (--allow_mismatch goes on all the same)"
        raise UserError.of([said, *found])
    return found


def open_uploader(options: HubOptions, machine: Machine) -> Uploader | None:
    """The way to the hub, if one was asked for; found to be open before anything slow happens. Raises UserError."""
    if not options.huggingface_repo_id or not machine.is_main:
        return None
    uploader = Uploader(options)
    uploader.check()
    return uploader


class Output:
    """Writes on behalf of the saver; knows how to come back from a state.

    Weights are written as they are used (see
    `OptimizerMode`), states as they are trained.
    """

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        trainable: Trainable,
        identity: Identity,
        model: ModelFacts,
        datasets: Sequence[ResolvedDataset],
        clock: Clock,
        reporter: Reporter,
        optimizer: OptimizerFacts,
        uploader: Uploader | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._trainable = trainable
        self._identity = identity
        self._clock = clock
        self._reporter = reporter
        self._optimizer = optimizer.optimizer
        self._schedule = optimizer.schedule
        self._mode = OptimizerMode(optimizer.optimizer)
        kind = trainable.artifact.modelspec_kind
        self._facts = run_facts(settings, identity, model, datasets, clock, machine.processes, optimizer, kind)
        self._uploader = uploader
        self._average = average
        options = settings[SaveOptions]
        self.saver = Saver(
            options,
            SavePlan.of(options, clock.num_epochs),
            trainable.artifact.suffix,
            is_main=machine.is_main,
            wait=machine.wait,
            write_model=self._write_model,
            write_state=self._write_state,
            write_average=self._write_average if average is not None else None,
            after_write=self._after_write,
        )

    def _write_model(self, path: Path, clock: Clock, finished_epochs: int) -> None:
        with self._mode.evaluating():
            self._write_weights(path, clock, finished_epochs, self._facts)

    def _write_average(self, path: Path, clock: Clock, finished_epochs: int) -> None:
        assert self._average is not None
        with self._average.in_use():
            self._write_weights(path, clock, finished_epochs, replace(self._facts, is_average=True))

    def _write_weights(self, path: Path, clock: Clock, finished_epochs: int, facts: RunFacts) -> None:
        options = {**self._settings.scrubbed_dict(), **self._trainable.recorded_options()}
        metadata = build_metadata(options, facts, epoch=finished_epochs, step=clock.step)
        self._refuse_broken_weights(path)
        dtype = save_dtype(self._settings[SaveOptions].save_precision)
        self._trainable.save(str(path), dtype, metadata, {"epoch": finished_epochs, "global_step": clock.step})

    def _refuse_broken_weights(self, path: Path) -> None:
        names = [name for name, tensor in self._trainable.state_tensors().items() if not bool(tensor.isfinite().all())]
        if names:
            raise UserError(f"{path} was not written: {len(names)} trained tensors are not finite, first {names[0]}")

    def _write_state(self, folder: Path, clock: Clock) -> None:
        run = RunState(
            step=clock.step,
            epoch=clock.epoch - 1,
            steps_in_epoch=clock.step_in_epoch,
            max_train_steps=clock.max_train_steps,
            num_epochs=clock.num_epochs,
            seed=self._identity.seed,
            session_id=self._identity.session_id,
            started_at=self._identity.started_at,
            loss_history=tuple(self._reporter.losses()),
            fingerprint=self._identity.fingerprint,
            saved=self.saver.saved.as_json(),
            validation=tuple(self._reporter.validation),
        )
        save_state(
            folder,
            run,
            self._trainable.state_tensors(),
            self._optimizer,
            self._schedule,
            self._machine.accelerator.scaler,
            self._average,
        )

    def _after_write(self, path: Path, is_state: bool, is_last: bool) -> None:
        if self._uploader is None or (is_state and not self._settings[HubOptions].save_state_to_huggingface):
            return
        self._uploader.upload(path, wait=is_last)

    def restore(self, folder: str, resumed: RunState) -> None:
        """Put everything back to where a state was written."""
        load_state(
            folder,
            self._trainable.state_tensors(),
            self._optimizer,
            self._schedule,
            self._machine.accelerator.scaler,
            self._average,
            step=resumed.step,
            keep_hyperparameters=self._settings[SaveOptions].allow_mismatch,
        )
        self._clock.seek({"epoch": resumed.epoch + 1, "step_in_epoch": resumed.steps_in_epoch, "step": resumed.step})
        self._reporter.restore(list(resumed.loss_history), list(resumed.validation), resumed.step)
        self.saver.go_on(Saved.from_json(resumed.saved), self._clock)
        logger.info("resumed %s at step %d of %d", folder, resumed.step, self._clock.max_train_steps)

    def finish(self, path: Path) -> None:
        """Close uploads and say what came of the run."""
        if self._uploader is not None:
            self._uploader.close()
        if self._machine.is_main:
            with self._mode.evaluating():  # as in the file
                lines = self._trainable.check(path)
            for line in lines:
                logger.info("%s", line)
            if self._reporter.skipped_steps:
                logger.warning("%d steps were skipped: loss or gradient was not finite", self._reporter.skipped_steps)
            logger.info("average loss %.4f over the last epoch's steps", self._reporter.average)
            validation = self._reporter.validation_line()
            if validation:
                logger.info("%s", validation)


def run_facts(
    settings: Settings,
    identity: Identity,
    model: ModelFacts,
    datasets: Sequence[ResolvedDataset],
    clock: Clock,
    processes: int,
    optimizer: OptimizerFacts,
    kind: str,
) -> RunFacts:
    """What metadata tell of the run beside its options."""
    return RunFacts(
        session_id=identity.session_id,
        started_at=identity.started_at,
        seed=identity.seed,
        optimizer=optimizer.recorded_name,
        num_batches_per_epoch=batches_per_epoch(datasets, processes),
        num_epochs=clock.num_epochs,
        max_train_steps=clock.max_train_steps,
        model=model,
        data=metadata_facts(datasets),
        processes=processes,
        relative_step=uses_relative_step(optimizer.optimizer),
        kind=kind,
        fingerprint=identity.fingerprint,
        commit_hash=commit_hash(),
    )
