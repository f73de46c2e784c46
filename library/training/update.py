"""From gradients to new weights: backward, synchronising processes, clipping, the optimizer and its schedule."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.log import UserError, first_line


class WeightUpdate:
    """One optimizer step at a time, through accelerate.

    ``max_grad_norm`` 0 means no clipping. Learning-rate schedules advance once per optimizer step, on every number of
    processes, and not at all for a step that the fp16 scaler dropped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        step: nn.Module,
        optimizer: Any,
        schedule: Any,
        parameters: list[nn.Parameter],
        max_grad_norm: float,
    ) -> None:
        self._accelerator = accelerator
        self.step = step
        self._optimizer = optimizer
        self._schedule = schedule
        self._parameters = parameters
        self._max_grad_norm = max_grad_norm

    def sync(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged between processes only in the last micro batch of a step."""
        return nullcontext() if is_last else self._accelerator.no_sync(self.step)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def total_norm(self) -> float:
        """Norm of all gradients (unscaled first under fp16), which are then clipped."""
        if self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(self._optimizer)
        limit = self._max_grad_norm if self._max_grad_norm > 0 else float("inf")
        grads = [p for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in grads if p.grad is not None])
        if limit != float("inf"):
            torch.nn.utils.clip_grads_with_norm_(grads, limit, norm)
        return float(norm)

    def apply(self) -> bool:
        """Change the weights; False if the fp16 scaler dropped the step. Raises UserError."""
        try:
            self._optimizer.step()
        except ArithmeticError as error:
            raise UserError(
                f"the optimizer cannot make this step ({first_line(error)}): some (DAdaptSGD) divide by the size of the"
                " gradients, which are 0 where no caption reaches what learns; take another --optimizer_type"
            ) from error
        was_applied = not self._accelerator.optimizer_step_was_skipped
        if was_applied:
            self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        return was_applied

    def discard(self) -> None:
        """Drop the gradients; the schedule goes on, since the step counts."""
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()  # its gradients were unscaled: it must forget them
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
