"""The optimizer inside the backward pass: each weight changes as soon as its gradient is whole, and the gradient goes.

No more than a few gradients exist at a time, so a full fine-tuning needs the memory of one copy of the weights less.
The price: nothing is known of all gradients together before the first weight has changed, so there is no common norm to
clip by, no accumulation, and no dropping of a whole step for one bad gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.log import UserError
from library.rng import torch_stream

Groups = Sequence[dict[str, Any]]
MakeOptimizer = Callable[[Groups], torch.optim.Optimizer]


class FusedUpdate:
    """Takes the place of `library.training.update.WeightUpdate`; for one process, one micro batch a step.

    ``max_grad_norm`` limits the norm of each tensor's gradient by itself; 0 leaves them. A gradient that is not finite
    is taken as 0, and `total_norm` tells of it. With a loss that is not finite there is no backward pass at all.
    """

    def __init__(
        self, accelerator: Accelerator, step: nn.Module, optimizer: Any, schedule: Any, max_grad_norm: float
    ) -> None:
        if accelerator.num_processes > 1:
            raise UserError("--fused_backward_pass works with one process: gradients of several would not be averaged")
        self.step = step
        self._optimizer = optimizer
        self._schedule = schedule
        self._max_grad_norm = max_grad_norm
        self._norms: list[Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, group))

    def sync(self, is_last: bool) -> AbstractContextManager[Any]:
        """One process has nobody to wait for."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The backward pass, which also changes the weights."""
        if bool(loss.isfinite()):
            loss.backward()
        else:
            self._norms.append(loss.detach().float())

    def _take_gradient(self, group: dict[str, Any], parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._norms.append(norm)  # stays on the device: reading it here would wait for the device at every tensor
        parameter.grad.masked_fill_(~norm.isfinite(), 0)
        if self._max_grad_norm > 0:
            parameter.grad.mul_((self._max_grad_norm / (norm + 1e-6)).clamp(max=1).nan_to_num(0))
        step_alone(self._optimizer, group, parameter)
        parameter.grad = None

    def total_norm(self) -> float:
        """Norm of all gradients of the step, before any limit."""
        norm = torch.linalg.vector_norm(torch.stack([one.to("cpu") for one in self._norms])) if self._norms else None
        self._norms.clear()
        return 0.0 if norm is None else float(norm)

    def apply(self) -> bool:
        """The weights have changed already; the schedule goes on."""
        self._schedule.step()
        return True

    def discard(self) -> None:
        """What was not finite changed nothing; the schedule goes on, since the step counts."""
        self._schedule.step()


def step_alone(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """One optimizer step that sees a single parameter, under the present settings of its group."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def refuse_joint_optimizer(make: MakeOptimizer, name: str, device: torch.device) -> None:
    """Raise UserError if an optimizer's step for one parameter depends on the others or on a count of its group.

    Found by trying: two steps on small tensors, together and one by one, must give the same weights, and leave the
    group's own entries alone (D-Adaptation, Prodigy and the schedule-free optimizers keep counts and estimates there).
    """
    together, apart = _probe(device), _probe(device)
    joint, single = make([{"params": together}]), make([{"params": apart}])
    before = _settings_of(joint)
    for number in range(2):
        for parameters in (together, apart):
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.randn(parameter.shape, generator=torch_stream(number, "probe", index)).to(device)
        joint.step()
        for parameter in apart:
            step_alone(single, single.param_groups[0], parameter)
    same = all(torch.allclose(one, other, rtol=1e-4) for one, other in zip(together, apart, strict=True))
    if not same or _settings_of(joint) != before:
        raise UserError(
            f"--fused_backward_pass: {name} looks at all weights together, so it cannot step one by one; use AdamW,"
            " Adafactor, Lion or another optimizer that treats each weight by itself"
        )


def _probe(device: torch.device) -> list[nn.Parameter]:
    shapes = ((4, 3), (5,), (2, 3, 2, 2))
    return [
        nn.Parameter(torch.randn(shape, generator=torch_stream(0, "probe weights", index)).to(device))
        for index, shape in enumerate(shapes)
    ]


def _settings_of(optimizer: torch.optim.Optimizer) -> list[str]:
    return [repr({key: value for key, value in group.items() if key != "params"}) for group in optimizer.param_groups]
