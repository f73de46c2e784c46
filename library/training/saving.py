"""When models and states are written, under which names, and which old ones are removed.

Removal looks at what this logical run wrote (the list travels in the state), not at computed names, so a changed
interval or a resumed run leaves nothing behind.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from library.checkpoint.folders import recover_all
from library.options import SaveOptions
from library.training.clock import Clock, due_counts, is_due
from library.training.loop import StepReport

logger = logging.getLogger(__name__)
Kind = Literal["epoch", "step", "end"]
AVERAGE, STATE = "-ema", "-state"
_DEFAULT_STEM: dict[Kind, str] = {"epoch": "epoch", "step": "at", "end": "last"}


@dataclass(frozen=True)
class SavePlan:
    """The cadence of a run, after ``save_n_epoch_ratio`` was turned into an interval."""

    every_n_epochs: int | None
    every_n_steps: int | None
    keep_epochs: int | None
    keep_steps: int | None
    keep_epoch_states: int | None
    keep_step_states: int | None
    with_state: bool
    state_at_end: bool

    @staticmethod
    def of(options: SaveOptions, num_epochs: int) -> SavePlan:
        every_n_epochs = options.save_every_n_epochs
        if options.save_n_epoch_ratio:
            every_n_epochs = max(1, num_epochs // options.save_n_epoch_ratio)
        return SavePlan(
            every_n_epochs=every_n_epochs,
            every_n_steps=options.save_every_n_steps,
            keep_epochs=options.save_last_n_epochs,
            keep_steps=options.save_last_n_steps,
            keep_epoch_states=options.save_last_n_epochs_state or options.save_last_n_epochs,
            keep_step_states=options.save_last_n_steps_state or options.save_last_n_steps,
            with_state=options.save_state,
            state_at_end=options.save_state or options.save_state_on_train_end,
        )

    def epoch_saves(self, num_epochs: int) -> list[int]:
        """Epochs after which a model is written; the last epoch only gives the final file."""
        return [epoch for epoch in due_counts(num_epochs, self.every_n_epochs) if epoch < num_epochs]

    def step_saves(self, max_train_steps: int) -> list[int]:
        """Optimizer steps after which a model is written."""
        return list(due_counts(max_train_steps, self.every_n_steps))


def stem(output_name: str | None, kind: Kind, count: int) -> str:
    """File name without extension: ``name-000002``, ``name-step00000100``, ``name``."""
    base = output_name or _DEFAULT_STEM[kind]
    if kind == "end":
        return base
    return f"{base}-{count:06d}" if kind == "epoch" else f"{base}-step{count:08d}"


def outdated(counts: list[int], newest: int, kind: Kind, keep_n: int | None, every_n: int | None) -> list[int]:
    """Which of the saved counts go once ``newest`` is written.

    Epochs: the newest ``keep_n`` saves stay. Steps: what is more than ``keep_n`` steps old goes.
    """
    if not keep_n or not every_n:
        return []
    limit = newest - keep_n * every_n if kind == "epoch" else (newest - keep_n - 1) // every_n * every_n
    return [count for count in counts if count <= limit]


def free_name(path: Path) -> Path:
    """The first of ``stem.old1.ext``, ``stem.old2.ext`` ... that does not exist. A folder's name has no ending."""
    base, ending = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    number = 1
    while True:
        candidate = path.with_name(f"{base}.old{number}{ending}")
        if not candidate.exists():
            return candidate
        number += 1


@dataclass
class Saved:
    """What the logical run has written so far: (kind, count, name) of models and of states."""

    models: list[tuple[Kind, int, str]] = field(default_factory=list)
    states: list[tuple[Kind, int, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"models": [list(item) for item in self.models], "states": [list(item) for item in self.states]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Saved:
        """The way back. Raises KeyError, TypeError or ValueError for what cannot have been written by us."""
        return Saved(*([_written(item) for item in value[name]] for name in ("models", "states")))


def _written(item: Any) -> tuple[Kind, int, str]:
    kind, count, name = item
    # outdated files are removed by these names: none of them may lead out of the output folder
    if kind not in _DEFAULT_STEM or type(count) is not int or Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{item!r} was not saved")
    return kind, count, name


class Saver:
    """Effect: writes models and states when they are due.

    ``write_model(path, clock, finished epochs)`` and ``write_state(folder, clock)`` do the writing, ``write_average``
    that of a second model, if there is one, whose name ends in `AVERAGE`; ``after_write(path, is_state, is_last)``
    hears of every finished file or folder (uploads). Only the main process writes; ``wait`` keeps the others in step.
    """

    def __init__(
        self,
        options: SaveOptions,
        plan: SavePlan,
        suffix: str,
        *,
        is_main: bool,
        wait: Callable[[], None],
        write_model: Callable[[Path, Clock, int], None],
        write_state: Callable[[Path, Clock], None],
        write_average: Callable[[Path, Clock, int], None] | None = None,
        after_write: Callable[[Path, bool, bool], None],
    ) -> None:
        self._options = options
        self._folder = Path(str(options.output_dir))
        self._plan = plan
        self._suffix = suffix
        self._is_main = is_main
        self._wait = wait
        self._write_model = write_model
        self._write_state = write_state
        self._write_average = write_average
        self._after_write = after_write
        self.saved = Saved()
        if is_main:
            clear_leftovers(self._folder, options.output_name)

    def after_step(self, clock: Clock, report: StepReport) -> None:
        if is_due(clock.step, self._plan.every_n_steps):
            self._save("step", clock.step, clock, self._plan.with_state)

    def after_epoch(self, clock: Clock) -> None:
        if is_due(clock.epoch, self._plan.every_n_epochs) and clock.epoch < clock.num_epochs:
            self._save("epoch", clock.epoch, clock, self._plan.with_state)

    def at_end(self, clock: Clock) -> Path:
        """The final model, and its state if asked for."""
        return self._save("end", 0, clock, self._plan.state_at_end)

    def go_on(self, saved: Saved, clock: Clock) -> None:
        """Take up what the run wrote before it was resumed.

        The model of a run that had ended is not this one's: it is kept when a longer run ends. Its state is replaced,
        whole by whole, as that of any run that goes on.
        """
        self.saved = saved
        if not clock.is_finished:
            saved.models[:] = [item for item in saved.models if item[0] != "end"]

    def state_beside(self, model: Path) -> Path:
        """The state folder that belongs to a model file or folder of this run."""
        return model.with_name(model.name.removesuffix(self._suffix) + STATE)

    def at_stop(self, clock: Clock) -> Path:
        """A stopped run is saved whole, whatever the options say, so that nothing is lost."""
        return self._save("step", clock.step, clock, with_state=True)

    def _save(self, kind: Kind, count: int, clock: Clock, with_state: bool) -> Path:
        name = stem(self._options.output_name, kind, count)
        path = self._folder / (name + self._suffix)
        self._wait()
        if self._is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._save_model(kind, count, path, clock, self._write_model)
            if self._write_average is not None:
                beside = self._folder / (name + AVERAGE + self._suffix)
                self._save_model(kind, count, beside, clock, self._write_average)
            if with_state:
                self._save_state(kind, count, name, clock)
            self._remove_old(kind, count)
        self._wait()
        return path

    def _save_model(
        self, kind: Kind, count: int, path: Path, clock: Clock, write: Callable[[Path, Clock, int], None]
    ) -> None:
        self._keep_foreign(path, self.saved.models)
        write(path, clock, clock.epoch - 1 if kind == "step" else clock.epoch)
        logger.info("saved %s", path)
        self._remember(self.saved.models, (kind, count, path.name))
        self._after_write(path, False, kind == "end")

    def _save_state(self, kind: Kind, count: int, name: str, clock: Clock) -> None:
        folder = self._folder / (name + STATE)
        self._keep_foreign(folder, self.saved.states)
        self._remember(self.saved.states, (kind, count, folder.name))
        # written in the midst of the epoch's end, which is over for whoever goes on from there
        self._write_state(folder, replace(clock, epoch=count + 1, step_in_epoch=0) if kind == "epoch" else clock)
        logger.info("saved state %s", folder)
        self._after_write(folder, True, kind == "end")

    def _keep_foreign(self, path: Path, ours: list[tuple[Kind, int, str]]) -> None:
        """A file of an earlier run is never overwritten: it moves to a numbered name."""
        if path.exists() and path.name not in {name for _, _, name in ours}:
            kept = free_name(path)
            path.rename(kept)
            logger.warning("%s existed before this run: kept as %s", path.name, kept.name)

    @staticmethod
    def _remember(items: list[tuple[Kind, int, str]], item: tuple[Kind, int, str]) -> None:
        if item not in items:
            items.append(item)

    def _remove_old(self, kind: Kind, newest: int) -> None:
        plan = self._plan
        if kind == "end":
            return
        every = plan.every_n_epochs if kind == "epoch" else plan.every_n_steps
        keep = plan.keep_epochs if kind == "epoch" else plan.keep_steps
        keep_states = plan.keep_epoch_states if kind == "epoch" else plan.keep_step_states
        for items, keep_n in ((self.saved.models, keep), (self.saved.states, keep_states)):
            gone = outdated([count for k, count, _ in items if k == kind], newest, kind, keep_n, every)
            for item in [item for item in items if item[0] == kind and item[1] in gone]:
                _remove(self._folder / item[2])
                items.remove(item)


def _remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name first, so that under its name it is whole or not there."""
    logger.info("removing old %s", path.name)
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.gone")
        shutil.rmtree(hidden, ignore_errors=True)
        path.replace(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(folder: Path, output_name: str | None) -> None:
    """Remove what a killed run of the same name left half written or half removed; put back what it was replacing.

    All of it has hidden names.
    """
    base = re.escape(output_name or "")
    stems = rf"{base}(-\d{{6}}|-step\d{{8}})?" if output_name else r"epoch-\d{6}|at-step\d{8}|last"
    names = rf"({stems})({AVERAGE}|{STATE})?"
    recover_all(folder, re.compile(names))
    pattern = re.compile(rf"\.+{names}((\.[0-9a-f]{{8}}\.tmp)+(\.\w+)?|\.gone)")
    for path in folder.iterdir() if folder.is_dir() else ():
        if pattern.fullmatch(path.name):
            logger.info("removing %s, left by a run that was killed", path.name)
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
