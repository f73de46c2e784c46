"""Training states on disk: everything that a resumed run needs to go on as if it had not been interrupted.

A state is a folder: ``state.json`` (where the run stands, and what must not have changed), ``trainable.safetensors``
(the trained tensors), ``training.json`` and ``training.safetensors`` (optimizer, schedule, gradient scaler). It is
written beside its place and renamed, so under its own name it is always whole. Random streams need no place in it:
draws are functions of seed and position.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from library.checkpoint.folders import atomic_folder, recover
from library.checkpoint.io import atomic_write_json, open_model_file, save_safetensors
from library.log import UserError
from library.training.saving import Saved
from library.training.state_tree import Json, TreeReader, TreeWriter

logger = logging.getLogger(__name__)

FORMAT = 1
RUN_FILE, TREE_FILE = "state.json", "training.json"
TRAINABLE_FILE, TENSOR_FILE = "trainable.safetensors", "training.safetensors"


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands (counters since its very beginning, over all sessions) and what it is.

    ``epoch`` is the number of finished epochs, ``steps_in_epoch`` the optimizer steps done since then.
    ``max_train_steps`` and ``num_epochs`` are the planned totals. ``started_at`` is a unix time, ``fingerprint`` comes
    from fingerprint.py, ``saved`` lists the files that the run has written (plain JSON values), ``validation``
    the steps and losses of its validations (states of former versions have none).
    """

    step: int
    epoch: int
    steps_in_epoch: int
    max_train_steps: int
    num_epochs: int
    seed: int
    session_id: int
    started_at: float
    loss_history: tuple[float, ...]
    fingerprint: dict[str, Any]
    saved: dict[str, Any] = field(default_factory=dict[str, Any])
    validation: tuple[tuple[int, float], ...] = ()


class HasState(Protocol):
    """A schedule, a gradient scaler, or an average of the weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class HasSteps(HasState, Protocol):
    """A schedule, which also goes on step by step."""

    def step(self) -> None: ...


class HasAverage(Protocol):
    """An average of the weights, which can also begin anew."""

    def load_state_dict(self, state: dict[str, Any] | None, /) -> None: ...


# ---- public


def save_state(
    folder: str | os.PathLike[str],
    run: RunState,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: HasState,
    scaler: HasState | None = None,
    average: HasState | None = None,
) -> None:
    """Write a state folder; an existing one of the same name is replaced only when the new one is whole.

    ``trainable``: the trained tensors by name, in the optimizer's training mode.
    Raises UserError (WriteError) if it cannot be written; then an existing folder stays as it was.
    """
    writer = TreeWriter()
    tree = {
        "optimizer": {"class": _class_name(optimizer), **_pack_optimizer(writer, optimizer)},
        "schedule": writer.encode(schedule.state_dict(), "schedule", lenient=True),
        "schedule class": type(schedule).__name__,
        "scaler": writer.encode(scaler.state_dict() if scaler else None, "scaler"),
        "average": writer.encode(average.state_dict() if average else None, "average"),
    }
    with atomic_folder(folder) as temporary:
        save_safetensors(temporary / TRAINABLE_FILE, dict(trainable), {})
        save_safetensors(temporary / TENSOR_FILE, writer.tensors, {})
        atomic_write_json(temporary / TREE_FILE, tree, indent=None)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        atomic_write_json(temporary / RUN_FILE, {"format": FORMAT, "files": sizes, **asdict(run)})


def read_run(folder: str | os.PathLike[str]) -> RunState:
    """Where the run of a state folder stands. Cheap: no tensor is read. Also checks that the folder is complete.

    Raises UserError for a missing, foreign, damaged or incomplete folder.
    """
    path = _existing(Path(folder))
    if not (path / RUN_FILE).is_file():
        raise UserError(f"--resume {path}: {_foreign(path)}")
    saved = _read_json(path / RUN_FILE)
    if saved.get("format") != FORMAT:
        raise UserError(f"--resume {path}: written by another version of this program (format {saved.get('format')})")
    try:
        for name, size in saved["files"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                problem = "is missing" if found is None else f"has {found:,} of {size:,} bytes"
                raise UserError(f"--resume {path}: the state is incomplete, {name} {problem}; use an earlier state")
        return _run_of(saved)
    except KeyError as error:
        raise UserError(f"--resume {path}: {RUN_FILE} lacks {error}; use an earlier state") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--resume {path}: {RUN_FILE} is damaged ({error}); use an earlier state") from error


_COUNTERS = ("step", "epoch", "steps_in_epoch", "max_train_steps", "num_epochs", "seed", "session_id")


def _run_of(saved: dict[str, Any]) -> RunState:
    """The entries of state.json. Raises KeyError, TypeError or ValueError for what cannot have been written by us."""
    saved = {"validation": [], **saved}
    values: dict[str, Any] = {field.name: saved[field.name] for field in fields(RunState)}
    for name in _COUNTERS:
        if type(values[name]) is not int or values[name] < 0:
            raise ValueError(f"{name} is {values[name]!r}")
    for name in ("fingerprint", "saved"):
        if not isinstance(values[name], dict):
            raise TypeError(f"{name} is no table")
    Saved.from_json(values["saved"])
    values["loss_history"] = tuple(float(loss) for loss in values["loss_history"])
    values["validation"] = tuple((int(step), float(loss)) for step, loss in values["validation"])
    return RunState(**values)


def load_state(
    folder: str | os.PathLike[str],
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: HasSteps,
    scaler: HasState | None = None,
    average: HasAverage | None = None,
    *,
    step: int = 0,
    keep_hyperparameters: bool = False,
) -> None:
    """Put a state back: into the tensors of ``trainable`` in place, the optimizer, the schedule, the scaler and the
    average (which is given None if the state has none).

    ``step``: the steps done, to which a schedule of another class than the state's is brought.
    ``keep_hyperparameters``: this run's learning rates, weight decay and betas stay in force instead of the state's
    (for a run that is resumed with changed options on purpose). Raises UserError if the state does not fit; the
    optimizer must have been made from the same groups of parameters.
    """
    path = _existing(Path(folder))
    tree = _read_json(path / TREE_FILE)
    try:
        _check_optimizer(path, tree["optimizer"], optimizer)
        _restore_trainable(path, trainable)
        with open_model_file(path / TENSOR_FILE) as file:
            reader = TreeReader(file.tensor)
            _restore_optimizer(reader, tree["optimizer"], optimizer, keep_hyperparameters)
            _restore_schedule(reader, tree, schedule, step)
            saved_scaler = reader.decode(tree["scaler"])
            if scaler is not None and saved_scaler is not None:
                scaler.load_state_dict(saved_scaler)
            if average is not None:
                average.load_state_dict(reader.decode(tree.get("average")))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--resume {path}: the state is damaged ({reason}); use an earlier state") from error


def _restore_schedule(reader: TreeReader, tree: dict[str, Json], schedule: HasSteps, step: int) -> None:
    own = type(schedule).__name__
    if tree.get("schedule class", own) == own:  # states of former versions do not tell
        schedule.load_state_dict(reader.decode(tree["schedule"]))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer's steps, which torch misses, were those of the earlier session
        for _ in range(step):
            schedule.step()


# ---- the trained tensors


def _restore_trainable(path: Path, trainable: Mapping[str, Tensor]) -> None:
    with open_model_file(path / TRAINABLE_FILE) as file:
        problems = [f"{name} is missing in the state" for name in trainable if name not in file.infos]
        problems += [f"{name} is not part of this run" for name in file.infos if name not in trainable]
        for name, tensor in trainable.items():
            info = file.infos.get(name)
            if info and (info.shape != tuple(tensor.shape) or info.torch_dtype != tensor.dtype):
                problems.append(
                    f"{name} is {info.shape} {info.dtype} in the state, {tuple(tensor.shape)} {tensor.dtype} here"
                )
        _refuse(path, "trained tensors", problems)
        with torch.no_grad():
            for name, tensor in trainable.items():
                tensor.copy_(file.tensor(name))


# ---- the optimizer
# Its own load_state_dict casts states to the type of their parameter, which loses bits: float32 states of bf16
# weights, 8-bit states. So states are put back as they were.

_HYPERPARAMETERS = ("lr", "initial_lr", "weight_decay", "betas", "eps", "momentum")


def _pack_optimizer(writer: TreeWriter, optimizer: torch.optim.Optimizer) -> dict[str, Json]:
    numbers = {id(p): i for i, p in enumerate(_parameters(optimizer))}
    groups: list[Json] = []
    for index, group in enumerate(optimizer.param_groups):
        values = {key: value for key, value in group.items() if key != "params"}
        shapes = [list(p.shape) for p in group["params"]]
        groups.append({"shapes": shapes, "values": writer.encode(values, f"group.{index}")})
    states = {
        str(numbers[id(key)]): writer.encode(dict(value), f"state.{numbers[id(key)]}")
        for key, value in optimizer.state.items()
        if id(key) in numbers
    }
    return {"groups": groups, "states": states}


def _check_optimizer(path: Path, saved: Json, optimizer: torch.optim.Optimizer) -> None:
    problems: list[str] = []
    if saved["class"] != _class_name(optimizer):
        problems.append(f"the state is of {saved['class']}, this run uses {_class_name(optimizer)}")
    here = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    there = [group["shapes"] for group in saved["groups"]]
    if len(here) != len(there):
        problems.append(f"the state has {len(there)} parameter groups, this run {len(here)}")
    elif here != there:
        problems += [
            f"parameter group {i} has {len(b)} tensors in the state and {len(a)} here, or their shapes differ"
            for i, (a, b) in enumerate(zip(here, there, strict=True))
            if a != b
        ]
    _refuse(path, "optimizer", problems)


def _restore_optimizer(reader: TreeReader, saved: Json, optimizer: torch.optim.Optimizer, keep: bool) -> None:
    for group, stored in zip(optimizer.param_groups, saved["groups"], strict=True):
        device = group["params"][0].device
        values = reader.decode(
            stored["values"], lambda former, here=device: here if former != "cpu" else torch.device("cpu")
        )
        group.update({key: value for key, value in values.items() if not (keep and key in _HYPERPARAMETERS)})
    optimizer.state.clear()
    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for number, encoded in saved["states"].items():
        parameter, group = owners[int(number)]
        optimizer.state[parameter] = {
            key: _decode_entry(reader, key, value, parameter, group) for key, value in encoded.items()
        }


def _decode_entry(reader: TreeReader, key: str, value: Json, parameter: Tensor, group: dict[str, Any]) -> Any:
    def place(former: str) -> torch.device:
        # torch keeps the step counters of plain optimizers on the CPU, where reading them costs no synchronisation
        counter = key == "step" and not (group.get("fused") or group.get("capturable"))
        return torch.device("cpu") if former == "cpu" and counter else parameter.device

    return reader.decode(value, place)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate wraps it


def _refuse(path: Path, what: str, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"--resume {path}: the state does not fit this run ({what}): {shown}")


# ---- reading


def _existing(folder: Path) -> Path:
    recover(folder)
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such state folder")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--resume {path.parent}: {path.name} is missing; use an earlier state") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {path}: cannot be read ({error}); use an earlier state") from error
    if not isinstance(value, dict):
        raise UserError(f"--resume {path}: it is not a training state")
    return value


def _foreign(path: Path) -> str:
    if (path / "optimizer.bin").exists() or (path / "scheduler.bin").exists():
        return (
            "it holds a state of another trainer (pickles without counters), which cannot be continued; start a new run"
            " with --network_weights and that run's last model"
        )
    return f"it is no state folder ({RUN_FILE} is missing)"
