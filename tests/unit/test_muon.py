"""Muon: orthogonal updates for matrices and kernels, AdamW's for everything else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from library.training import muon
from library.training.muon import Muon, is_matrix, orthogonal


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (96, 12), (64, 48)])
def test_updates_are_nearly_orthogonal_and_keep_the_singular_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    update = orthogonal(torch.stack([torch.ones(shape), 100 * matrix]))[1]
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6
    assert values.max() < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar = left @ right
    assert torch.nn.functional.cosine_similarity(update.flatten(), polar.flatten(), dim=0) > 0.97


def test_what_counts_as_a_matrix() -> None:
    assert is_matrix(torch.empty(32, 4, 3, 3))
    assert is_matrix(torch.empty(96, 64))
    assert not is_matrix(torch.empty(96))
    assert not is_matrix(torch.empty(49408, 64))
    assert not is_matrix(torch.empty(4, 64, 3, 3))


def test_a_step_is_the_formula() -> None:
    torch.manual_seed(0)
    kernel, bias = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(6))
    old_kernel, twin = kernel.detach().clone(), nn.Parameter(bias.detach().clone())
    optimizer = Muon([kernel, bias], lr=0.02, momentum=0.9, adam_ratio=0.05, betas=(0.8, 0.95))
    adam = torch.optim.AdamW([twin], lr=0.001, betas=(0.8, 0.95), weight_decay=0.0)
    mean = torch.zeros_like(kernel)
    wanted = old_kernel
    for _ in range(3):
        kernel.grad, bias.grad = torch.randn_like(kernel), torch.randn_like(bias)
        twin.grad = bias.grad.clone()
        mean = 0.9 * mean + 0.1 * kernel.grad
        direction = orthogonal((0.1 * kernel.grad + 0.9 * mean).reshape(1, 6, 27)).reshape(kernel.shape)
        wanted = wanted - 0.02 * 0.2 * math.sqrt(27) * direction
        optimizer.step()
        adam.step()
    torch.testing.assert_close(kernel.detach(), wanted)
    torch.testing.assert_close(bias.detach(), twin.detach())


def test_weight_decay_and_absent_gradients() -> None:
    decayed, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    decayed.grad = torch.zeros(2)
    Muon([decayed, still], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(decayed.detach(), torch.full((2,), 0.95))
    assert torch.equal(still.detach(), torch.ones(3))


def test_weights_of_one_shape_learn_together_as_they_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(most_at_once: int) -> list[torch.Tensor]:
        monkeypatch.setattr(muon, "MOST_AT_ONCE", most_at_once)
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(6, 4)) for _ in range(5)]
        for weight in weights:
            weight.grad = torch.randn(6, 4)
        Muon(weights, lr=0.1).step()
        return [weight.detach() for weight in weights]

    for together, alone in zip(after(48), after(1), strict=True):
        torch.testing.assert_close(together, alone)


def train(steps: int, resume_at: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5))
    optimizer = Muon(net.parameters(), lr=0.01)
    for step in range(steps):
        if step == resume_at:
            saved, optimizer = optimizer.state_dict(), Muon(net.parameters(), lr=0.01)
            optimizer.load_state_dict(saved)
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


def test_a_saved_state_goes_on_exactly() -> None:
    assert all(torch.equal(a, b) for a, b in zip(train(6), train(6, resume_at=3), strict=True))


def test_directions_of_small_gradients_learn_as_fast() -> None:
    """The badly scaled task for which it was made: after as many steps Muon is far ahead of SGD with momentum."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -2, 16)
    wanted = torch.randn(16, 16)

    def error(make: type[torch.optim.Optimizer], **settings: float) -> float:
        weight = nn.Parameter(torch.zeros(16, 16))
        optimizer = make([weight], **settings)
        for step in range(150):
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * (1 - step / 150)
            optimizer.zero_grad()
            (scales[:, None] * (weight - wanted)).square().sum().backward()
            optimizer.step()
        return float((weight.detach() - wanted).square().mean())

    assert error(Muon, lr=0.4) < 0.01
    assert error(torch.optim.SGD, lr=0.4, momentum=0.9) > 0.1


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"adam_ratio": -1.0}])
def test_impossible_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        Muon([nn.Parameter(torch.ones(2, 2))], **wrong)
