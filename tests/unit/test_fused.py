"""The optimizer inside the backward pass: the same weights as one joint step, and no gradient left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from library.log import UserError
from library.options import OptimizerOptions
from library.training.fused import FusedUpdate, refuse_joint_optimizer, step_alone
from library.training.optimizers import create_optimizer

CPU = torch.device("cpu")
PER_PARAMETER = ["AdamW", "AdaFactor", "Lion", "SGDNesterov", "torch.optim.RMSprop", "AdamW8bit", "Adagrad"]
JOINT = ["Prodigy", "DAdaptAdam", "DAdaptLion", "AdamWScheduleFree"]


class _Schedule:
    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


def _maker(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    options = OptimizerOptions(optimizer_type=name, learning_rate=0.1)
    return lambda groups: create_optimizer(options, groups, CPU)[0]


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("name", PER_PARAMETER)
def test_per_parameter_optimizers_are_taken(name: str) -> None:
    refuse_joint_optimizer(_maker(name), name, CPU)


@pytest.mark.parametrize("name", JOINT)
def test_joint_optimizers_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="looks at all weights together"):
        refuse_joint_optimizer(_maker(name), name, CPU)


@pytest.mark.parametrize("name", ["AdamW", "AdaFactor", "Lion"])
def test_equals_joint_steps(name: str) -> None:
    fused, plain = _model(), _model()
    groups = lambda model: [  # noqa: E731
        {"params": list(model[0].parameters()), "lr": 0.01},
        {"params": list(model[2].parameters()), "lr": 0.002},
    ]
    options = OptimizerOptions(
        optimizer_type=name, optimizer_args=["relative_step=False"] if name == "AdaFactor" else None
    )
    optimizer, joint = (create_optimizer(options, groups(model), CPU)[0] for model in (fused, plain))
    update = FusedUpdate(Accelerator(cpu=True), fused, optimizer, _Schedule(), max_grad_norm=0)
    for number in range(4):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(number))
        update.backward(fused(x).square().mean())
        assert all(parameter.grad is None for parameter in fused.parameters())
        assert update.apply()
        plain(x).square().mean().backward()
        expected = float(nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None]))
        assert update.total_norm() == pytest.approx(expected, rel=1e-5)
        joint.step()
        joint.zero_grad()
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_gradients_do_not_pile_up() -> None:
    """When the first layer's gradient comes, those of the later layers are gone."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    update = FusedUpdate(Accelerator(cpu=True), model, _maker("AdamW")([{"params": list(model.parameters())}]), None, 0)
    update.backward(model(torch.ones(2, 4)).sum())
    assert alive == [1] * 5


def test_each_tensor_is_limited_by_itself() -> None:
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update = FusedUpdate(Accelerator(cpu=True), model, optimizer, _Schedule(), max_grad_norm=0.5)
    update.backward(100 * model(torch.ones(1, 3)).sum())
    assert float((model.weight.detach() - before).norm()) == pytest.approx(0.5, rel=1e-4)
    assert update.total_norm() == pytest.approx(100 * 6**0.5, rel=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model, schedule = _model(), _Schedule()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    update = FusedUpdate(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=1.0), schedule, 1.0)
    update.backward(model(torch.full((1, 5), float("nan"))).sum())
    assert not torch.tensor(update.total_norm()).isfinite()
    update.discard()
    assert schedule.steps == 1
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    """The loss is finite; the square root at 0 has no finite slope, and only its branch is concerned."""
    bad, good = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([bad, good], lr=1.0)
    update = FusedUpdate(Accelerator(cpu=True), nn.Identity(), optimizer, _Schedule(), max_grad_norm=10.0)
    update.backward(bad.sqrt().sum() + good.sum())
    assert not torch.tensor(update.total_norm()).isfinite()
    assert bad.tolist() == [0, 0]
    assert good.tolist() == [0, 0]


def test_the_optimizer_keeps_its_groups_when_a_step_fails() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("broken")

    parameter = nn.Parameter(torch.ones(2))
    optimizer = Broken([parameter], lr=1.0)
    with pytest.raises(RuntimeError, match="broken"):
        step_alone(optimizer, optimizer.param_groups[0], parameter)
    assert optimizer.param_groups[0]["params"] == [parameter]
