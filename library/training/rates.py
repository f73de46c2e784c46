"""The learning rates of a run as numbers to be read: those in force, for logs, and a table of those to come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.log import UserError, first_line
from library.training.lr import built_in_multiplier, class_schedule, warmup_steps
from library.training.optimizers import uses_relative_step

if TYPE_CHECKING:
    from library.options import ScheduleOptions


@dataclass(frozen=True, slots=True)
class RateRow:
    """One parameter group in the table of learning rates; ``rates`` belong to ``steps``, None = the optimizer
    decides.
    """

    name: str
    parameters: int
    steps: tuple[int, ...]
    rates: tuple[float | None, ...]


def learning_rates(optimizer: torch.optim.Optimizer) -> list[tuple[str, float]]:
    """The rates in force, under the names that they are logged by.

    ``lr/<name>`` for each group by its ``lr_name`` (else ``group<i>``); optimizers that find the rate by themselves
    (D-Adaptation, Prodigy: key ``d``) add ``lr/d*lr``, per group if there are more than two.
    """
    groups = optimizer.param_groups
    names = group_names(optimizer)
    rates = [_rate_of(optimizer, index) for index in range(len(groups))]
    result = [(f"lr/{name}", rate) for name, rate in zip(names, rates, strict=True)]
    adaptive = [(i, float(group["d"]) * rates[i]) for i, group in enumerate(groups) if group.get("d") is not None]
    if len(groups) <= 2:
        return result + [("lr/d*lr", product) for i, product in adaptive if i == 0]
    return result + [(f"lr/d*lr/{names[i]}", product) for i, product in adaptive]


def group_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """One name for each parameter group, unique in the optimizer."""
    names: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        name = str(group.get("lr_name") or f"group{index}")
        names.append(name if name not in names else f"{name}_group{index}")
    return names


def table(options: ScheduleOptions, optimizer: torch.optim.Optimizer, max_train_steps: int) -> tuple[RateRow, ...]:
    """For each group its number of parameters and its rate at step 0, at the end of the warm-up, in the middle and at
    the last step. Raises UserError for rates that cannot be.

    Call it with a fresh optimizer: the group's rates are taken as the full ones. The optimizer is not changed.
    """
    warmup = warmup_steps(options.lr_warmup_steps, max_train_steps)
    last = max(0, max_train_steps - 1)
    steps = tuple(sorted({0, min(warmup, last), min(max_train_steps // 2, last), last}))
    names, groups = group_names(optimizer), optimizer.param_groups
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    if uses_relative_step(optimizer):
        return tuple(RateRow(n, c, steps, (None,) * len(steps)) for n, c in zip(names, counts, strict=True))
    fulls = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if options.lr_scheduler_type:
        rates = _simulated(options, fulls, steps)
    else:
        multiplier = built_in_multiplier(options, max_train_steps, optimizer.defaults.get("lr"))
        rates = {step: [full * multiplier(step) for full in fulls] for step in steps}
    _require_rates(options, rates)
    return tuple(
        RateRow(name, count, steps, tuple(rates[step][index] for step in steps))
        for index, (name, count) in enumerate(zip(names, counts, strict=True))
    )


def _require_rates(options: ScheduleOptions, rates: Mapping[int, list[float]]) -> None:
    name = f"_type {options.lr_scheduler_type}" if options.lr_scheduler_type else f" {options.lr_scheduler}"
    for step, group_rates in rates.items():
        wrong = [rate for rate in group_rates if not math.isfinite(rate) or rate < 0]
        if wrong:
            raise UserError(
                f"--lr_scheduler{name}: the learning rate is {wrong[0]:g} at step {step}; look at --lr_scheduler_args"
            )


def _simulated(options: ScheduleOptions, fulls: list[float], steps: tuple[int, ...]) -> dict[int, list[float]]:
    """Rates of a schedule class, which only running it can tell: on a stand-in optimizer with the same full rates."""
    stand_in = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in fulls], lr=0.0)
    schedule = class_schedule(options, stand_in)
    rates: dict[int, list[float]] = {}
    for step in range(steps[-1] + 1):
        if step in steps:
            rates[step] = [float(group["lr"]) for group in stand_in.param_groups]
        stand_in.step()
        try:
            schedule.step()
        except Exception as error:  # classes look at their arguments when they use them
            raise UserError(
                f"--lr_scheduler_type {options.lr_scheduler_type} fails after step {step + 1} of {steps[-1] + 1}:"
                f" {first_line(error)}; look at --lr_scheduler_args"
            ) from error
    return rates


def table_lines(rows: tuple[RateRow, ...]) -> list[str]:
    """The table as text."""
    if not rows:
        return []
    width = max(len("component"), *(len(row.name) for row in rows))
    lines = [f"{'component':<{width}} {'parameters':>12}" + "".join(f" {f'step {s}':>12}" for s in rows[0].steps)]
    for row in rows:
        cells = "".join(f" {'optimizer' if rate is None else f'{rate:.3g}':>12}" for rate in row.rates)
        lines.append(f"{row.name:<{width}} {row.parameters:>12,}{cells}")
    return lines


def _rate_of(optimizer: torch.optim.Optimizer, index: int) -> float:
    group = optimizer.param_groups[index]
    if group["lr"] is not None:
        return float(group["lr"])
    # Adafactor's relative step (Shazeer and Stern 2018, section 8), as far as the first tensor of the group has come
    state: Mapping[str, Any] = optimizer.state.get(group["params"][0], {})
    step = int(state.get("step", 0))
    if step == 0:
        return 0.0
    limit = 1e-6 * step if group.get("warmup_init") else 1e-2
    scale = max(group["eps"][1], float(state["RMS"])) if group.get("scale_parameter") else 1.0
    return scale * min(limit, 1.0 / math.sqrt(step))
