"""Effect: an exponential moving average of the trained weights (EMA), kept beside them in float32."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.log import UserError
from library.options import EmaOptions
from library.training.clock import Clock
from library.training.loop import StepReport


class WeightAverage:
    """After the n-th update (n from 1): average = d average + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)).

    The average starts as the weights are; the rising d is the warm-up of TensorFlow's ExponentialMovingAverage
    (argument num_updates), without which the start would weigh too much. Skipped steps count for nothing. Processes
    hold the same weights and so the same average. It takes 4 bytes for each number that learns, on the weights' device
    or on ``device``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, device: str | None = None) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._device = device
        self._updates = 0
        self._average: list[Tensor] = []
        self._start()

    def _start(self) -> None:
        self._updates = 0
        self._average = [self._in_float32(parameter).clone() for parameter in self._parameters]

    def _in_float32(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().to(self._device or parameter.device, torch.float32)

    def after_step(self, clock: Clock, report: StepReport) -> None:
        """Follow the weights, if they have moved."""
        if report.was_skipped:
            return
        self._updates += 1
        kept = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.lerp_(self._in_float32(parameter), 1 - kept)

    def after_epoch(self, clock: Clock) -> None:
        """Nothing: the average follows steps."""

    @contextmanager
    def in_use(self) -> Generator[None]:
        """The average in the place of the weights, in their own type; exactly the former weights afterwards.

        These wait in main memory, so that saving needs no more of the device's.
        """
        former = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]
        self._put(self._average)
        try:
            yield
        finally:
            self._put(former)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For the training state."""
        return {"updates": self._updates, "average": list(self._average)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state; None, of a run that kept no average, begins one with the weights as they are now."""
        self._start()
        if state is None:
            return
        self._updates = int(state["updates"])
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)


def make_average(
    options: EmaOptions, parameters: Iterable[nn.Parameter], *, optimizer_averages: bool
) -> WeightAverage | None:
    """The average that was asked for, if any. Raises UserError beside an optimizer that keeps one of its own."""
    if not options.ema_decay:
        return None
    if optimizer_averages:
        raise UserError("--ema_decay: schedule-free optimizers average the weights by themselves; leave it out")
    return WeightAverage(parameters, options.ema_decay, options.ema_device)
