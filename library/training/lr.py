"""Learning rates over time, counted in optimizer steps whatever the number of processes or micro batches.

A schedule is a factor on each parameter group's own rate. Step numbers start at 0; T is the planned number of
optimizer steps and W the length of the warm-up. ``Schedule.step()`` is called once after each optimizer step that
took place.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from library.log import UserError, first_line, nearest
from library.training.optimizers import is_schedule_free, parse_arguments, uses_relative_step

if TYPE_CHECKING:
    from library.options import ScheduleOptions

logger = logging.getLogger(__name__)

Multiplier = Callable[[int], float]


class Schedule(Protocol):
    """What the training loop calls."""

    def step(self) -> None:
        """Go on to the next optimizer step's rates."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# ---- public


def create_schedule(options: ScheduleOptions, optimizer: torch.optim.Optimizer, max_train_steps: int) -> Schedule:
    """Make the schedule that the options name; sets the rates of step 0, and warns of what probably is not meant.

    Raises UserError for unknown names and arguments, and for a warm-up where there is none.
    """
    if uses_relative_step(optimizer):
        if options.lr_scheduler not in ("constant", "adafactor") or options.lr_scheduler_type:
            logger.warning("Adafactor with relative_step makes its own rate: the learning-rate schedule has no effect")
        return _NoSchedule()
    if options.lr_scheduler_type:
        return class_schedule(options, optimizer)
    if is_schedule_free(optimizer) and options.lr_scheduler != "constant":
        logger.warning(
            "a schedule-free optimizer is made for --lr_scheduler constant (its own warm-up: --optimizer_args"
            " warmup_steps=N); %s is applied on top of it",
            options.lr_scheduler,
        )
    multiplier = built_in_multiplier(options, max_train_steps, optimizer.defaults.get("lr"))
    warmup = warmup_steps(options.lr_warmup_steps, max_train_steps)
    if options.lr_scheduler.lower() != "piecewise_constant" and warmup > max_train_steps:
        logger.warning("--lr_warmup_steps %d is longer than the run of %d steps", warmup, max_train_steps)
    return _MultiplierSchedule(optimizer, multiplier)


def built_in_multiplier(options: ScheduleOptions, max_train_steps: int, learning_rate: float | None) -> Multiplier:
    """The factor as a function of the step, for a built-in schedule. ``learning_rate`` matters to polynomial only."""
    name = options.lr_scheduler.lower()
    if name not in _BUILT_IN:
        if name.startswith("adafactor"):
            raise UserError("--lr_scheduler adafactor goes with --optimizer_type AdaFactor and relative_step=True only")
        hint = nearest(name, _BUILT_IN) or f"; known: {', '.join(_BUILT_IN)}"
        raise UserError(f"--lr_scheduler {options.lr_scheduler}: there is no such schedule{hint}")
    warmup = warmup_steps(options.lr_warmup_steps, max_train_steps)
    if name == "constant" and warmup:
        raise UserError(
            f"--lr_scheduler constant has no warm-up, but --lr_warmup_steps is {options.lr_warmup_steps};"
            " use --lr_scheduler constant_with_warmup, or --lr_warmup_steps 0"
        )
    build = _BUILT_IN[name]
    arguments = parse_arguments(options.lr_scheduler_args or [], "lr_scheduler_args")
    accepted = [key for key in inspect.signature(build).parameters if key != "plan"]
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        listed = ", ".join(accepted) or "none"
        raise UserError(f"--lr_scheduler_args: {name} has no argument {', '.join(unknown)}; its arguments: {listed}")
    plan = _Plan(max_train_steps, warmup, learning_rate, options.lr_scheduler_num_cycles, options.lr_scheduler_power)
    try:
        multiplier = build(plan, **arguments)
        multiplier(warmup)  # what is no number shows only here
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr_scheduler {name}: {error}") from error
    return multiplier


def warmup_steps(value: float | str | None, max_train_steps: int, option: str = "--lr_warmup_steps") -> int:
    """A length in optimizer steps from a whole number, a fraction of the run (0 < x < 1), or a percentage such as
    "10%".

    ``option`` is the name in error messages.
    """
    if value is None:
        return 0
    try:
        number = float(str(value).strip().removesuffix("%")) / (100 if _is_percentage(value) else 1)
    except ValueError:
        raise UserError(f"{option} {value!r}: give steps (500), a fraction (0.1) or a percentage (10%)") from None
    if number < 0 or not math.isfinite(number) or (_is_percentage(value) and number > 1):
        raise UserError(f"{option} {value!r}: out of range")
    if _is_percentage(value) or 0 < number < 1:
        return round(number * max_train_steps)
    if number != int(number):
        raise UserError(f"{option} {value!r}: steps are whole numbers, fractions are below 1")
    return int(number)


# ---- built-in schedules


@dataclass(frozen=True, slots=True)
class _Plan:
    total: int
    warmup: int
    learning_rate: float | None
    cycles: int
    power: float

    def progress(self, step: int) -> float:
        """Share of the way from the end of the warm-up to T, not limited to 1."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def _after_warmup(plan: _Plan, then: Multiplier) -> Multiplier:
    return lambda step: step / max(1, plan.warmup) if step < plan.warmup else then(step)


def _constant(plan: _Plan) -> Multiplier:
    return lambda step: 1.0


def _constant_with_warmup(plan: _Plan) -> Multiplier:
    return _after_warmup(plan, lambda step: 1.0)


def _linear(plan: _Plan) -> Multiplier:
    return _after_warmup(plan, lambda step: max(0.0, 1.0 - plan.progress(step)))


def _cosine_wave(progress: float, cycles: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress)))


def _cosine(plan: _Plan, num_cycles: float = 0.5) -> Multiplier:
    return _after_warmup(plan, lambda step: _cosine_wave(plan.progress(step), num_cycles))


def _cosine_with_min_lr(plan: _Plan, num_cycles: float = 0.5, min_lr_ratio: float = 0.1) -> Multiplier:
    _check_ratio(min_lr_ratio)

    def after(step: int) -> float:
        return min_lr_ratio + (1.0 - min_lr_ratio) * _cosine_wave(min(1.0, plan.progress(step)), num_cycles)

    return _after_warmup(plan, after)


def _cosine_with_restarts(plan: _Plan, num_cycles: int | None = None) -> Multiplier:
    cycles = plan.cycles if num_cycles is None else num_cycles

    def after(step: int) -> float:
        progress = plan.progress(step)
        return 0.0 if progress >= 1.0 else _cosine_wave(cycles * progress % 1.0, 0.5)

    return _after_warmup(plan, after)


def _polynomial(plan: _Plan, lr_end: float = 1e-7, power: float | None = None) -> Multiplier:
    exponent = plan.power if power is None else power
    rate = plan.learning_rate or 0.0
    if rate <= lr_end:
        raise ValueError(f"--learning_rate {rate} must be above the final rate lr_end={lr_end}")
    floor = lr_end / rate
    return _after_warmup(plan, lambda step: floor + (1.0 - floor) * max(0.0, 1.0 - plan.progress(step)) ** exponent)


def _inverse_sqrt(plan: _Plan, timescale: float | None = None) -> Multiplier:
    scale = timescale or plan.warmup or 10_000
    if scale < 0:
        raise ValueError(f"timescale={timescale} must be above 0")
    return _after_warmup(plan, lambda step: 1.0 / math.sqrt((step + scale - plan.warmup) / scale))


def _warmup_stable_decay(
    plan: _Plan, num_decay_steps: float | str = 0.1, min_lr_ratio: float = 0.0, num_cycles: float = 0.5
) -> Multiplier:
    _check_ratio(min_lr_ratio)
    decay = warmup_steps(num_decay_steps, plan.total, "--lr_scheduler_args num_decay_steps")
    start = max(plan.warmup, plan.total - decay)

    def after(step: int) -> float:
        progress = min(1.0, max(0.0, (step - start) / max(1, plan.total - start)))
        return min_lr_ratio + (1.0 - min_lr_ratio) * _cosine_wave(progress, num_cycles)

    return _after_warmup(plan, after)


def _piecewise_constant(plan: _Plan, step_rules: str | None = None) -> Multiplier:
    example = (
        "--lr_scheduler_args \"step_rules='1:100,0.1:200,0.01'\" (factor 1 up to step 100, 0.1 up to 200, then 0.01)"
    )
    if not isinstance(step_rules, str):
        raise ValueError(f"needs its steps: {example}")
    try:
        *bounded, last = step_rules.split(",")
        bounds = sorted((int(until), float(factor)) for factor, until in (rule.split(":") for rule in bounded))
        final = float(last)
    except ValueError:
        raise ValueError(f"step_rules {step_rules!r} is not of the form {example}") from None
    if not all(0.0 <= factor < math.inf for factor in (final, *(factor for _, factor in bounds))):
        raise ValueError(f"step_rules {step_rules!r} has factors that are no rates: they must be 0 or more")
    return lambda step: next((factor for until, factor in bounds if step < until), final)


def _check_ratio(min_lr_ratio: float) -> None:
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(f"min_lr_ratio={min_lr_ratio} must lie between 0 and 1")


_BUILT_IN: Mapping[str, Callable[..., Multiplier]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise_constant": _piecewise_constant,
}


# ---- the three kinds of schedule


class _NoSchedule:
    def step(self) -> None:
        return

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


class _MultiplierSchedule:
    """Sets each group's rate to its own full rate times a function of the step; the step number is the whole state."""

    def __init__(self, optimizer: torch.optim.Optimizer, multiplier: Multiplier) -> None:
        self._optimizer = optimizer
        self._multiplier = multiplier
        self._step = 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._apply()

    def step(self) -> None:
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        self._apply()

    def _apply(self) -> None:
        factor = self._multiplier(self._step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def class_schedule(options: ScheduleOptions, optimizer: torch.optim.Optimizer) -> Schedule:
    """The schedule of ``--lr_scheduler_type``, a class of torch or the user's own. Raises UserError."""
    name = options.lr_scheduler_type
    if options.lr_warmup_steps not in (0, 0.0, None, "0"):
        raise UserError(
            f"--lr_scheduler_type {name}: --lr_warmup_steps applies to built-in schedules only; set it to 0"
        )
    module_name, _, class_name = (name if "." in name else f"torch.optim.lr_scheduler.{name}").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"--lr_scheduler_type {name}: cannot import {module_name} ({error})") from error
    scheduler_class: Any = getattr(module, class_name, None)
    if not inspect.isclass(scheduler_class):
        hint = nearest(class_name, dir(module))
        raise UserError(f"--lr_scheduler_type {name}: {module_name} has no such class{hint}")
    if issubclass(scheduler_class, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError(
            f"--lr_scheduler_type {name}: it follows a measured loss, which this program does not feed; choose another"
        )
    arguments = parse_arguments(options.lr_scheduler_args or [], "lr_scheduler_args")
    try:
        return cast("Callable[..., Schedule]", scheduler_class)(optimizer, **arguments)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, LookupError) as error:
        reason = first_line(error)
        raise UserError(f"--lr_scheduler_type {name} refuses its arguments (--lr_scheduler_args): {reason}") from error


# ---- small helpers


def _is_percentage(value: object) -> bool:
    return isinstance(value, str) and value.strip().endswith("%")
