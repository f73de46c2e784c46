"""Learning-rate schedules against their formulas, counted in optimizer steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.log import UserError
from library.options import OptimizerOptions, ScheduleOptions
from library.training.lr import built_in_multiplier, create_schedule, warmup_steps
from library.training.optimizers import create_optimizer
from library.training.rates import group_names, learning_rates, table, table_lines

T = 40


def sgd(*rates: float, names: tuple[str, ...] = ("textencoder", "unet")) -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(3))], "lr": lr, "lr_name": name}
        for lr, name in zip(rates, names, strict=False)
    ]
    return torch.optim.SGD(groups, lr=1e-3)


def curve(steps: int = T, **options) -> list[float]:
    multiplier = built_in_multiplier(ScheduleOptions(**options), T, 1e-3)
    return [multiplier(step) for step in range(steps)]


def test_values_of_every_formula() -> None:
    assert curve(lr_scheduler="constant") == [1.0] * T
    warm = curve(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    assert warm[:6] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    linear = curve(T + 5, lr_scheduler="linear", lr_warmup_steps=10)
    assert linear[10] == 1.0
    assert linear[25] == pytest.approx(0.5)
    assert linear[T:] == [0.0] * 5
    cosine = curve(T + 1, lr_scheduler="cosine")
    assert cosine[20] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine[T] == pytest.approx(0.0, abs=1e-12)
    restarts = curve(T + 3, lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2)
    assert restarts[0] == restarts[20] == 1.0
    assert restarts[10] == pytest.approx(0.5)
    assert restarts[T:] == [0.0] * 3
    square = curve(T + 1, lr_scheduler="polynomial", lr_scheduler_power=2)
    assert square[20] == pytest.approx(0.25, abs=1e-4)
    assert square[T] == pytest.approx(1e-7 / 1e-3)
    inverse = curve(lr_scheduler="inverse_sqrt", lr_warmup_steps=4)
    assert inverse[4] == 1.0
    assert inverse[16] == pytest.approx(0.5)
    floor = curve(T + 9, lr_scheduler="cosine_with_min_lr", lr_scheduler_args=["min_lr_ratio=0.2"])
    assert floor[20] == pytest.approx(0.6)
    assert floor[T:] == [pytest.approx(0.2)] * 9
    stable = curve(
        T + 1, lr_scheduler="warmup_stable_decay", lr_warmup_steps=4, lr_scheduler_args=["num_decay_steps=10"]
    )
    assert stable[2] == 0.5
    assert stable[4:31] == [1.0] * 27
    assert stable[35] == pytest.approx(0.5)
    assert stable[T] == pytest.approx(0.0)
    pieces = curve(lr_scheduler="piecewise_constant", lr_scheduler_args=["step_rules='1:10,0.1:20,0.01:30,0.005'"])
    assert [pieces[i] for i in (0, 9, 10, 19, 20, 29, 30, 39)] == [1, 1, 0.1, 0.1, 0.01, 0.01, 0.005, 0.005]


ORACLES = {
    "constant_with_warmup": lambda o: _diffusers().get_constant_schedule_with_warmup(o, 5),
    "linear": lambda o: _diffusers().get_linear_schedule_with_warmup(o, 5, T),
    "cosine": lambda o: _diffusers().get_cosine_schedule_with_warmup(o, 5, T),
    "cosine_with_restarts": lambda o: _diffusers().get_cosine_with_hard_restarts_schedule_with_warmup(o, 5, T, 3),
    "polynomial": lambda o: _diffusers().get_polynomial_decay_schedule_with_warmup(o, 5, T, power=2.0),
}


def _diffusers():
    from diffusers import optimization

    return optimization


@pytest.mark.parametrize("name", ORACLES)
def test_equal_to_diffusers_for_groups_of_different_rates(name: str) -> None:
    ours, theirs = sgd(1e-4, 1e-3), sgd(1e-4, 1e-3)
    options = ScheduleOptions(lr_scheduler=name, lr_warmup_steps=5, lr_scheduler_num_cycles=3, lr_scheduler_power=2.0)
    schedule, oracle = create_schedule(options, ours, T), ORACLES[name](theirs)
    for _ in range(T + 3):
        for mine, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(expected["lr"], rel=1e-9, abs=1e-15)
        ours.step()
        schedule.step()
        theirs.step()
        oracle.step()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["linear", "cosine", "cosine_with_restarts", "polynomial", "cosine_with_min_lr"]),
    total=st.integers(1, 500),
    warmup=st.integers(0, 600),
    step=st.integers(0, 1200),
)
def test_factors_stay_between_0_and_1(name: str, total: int, warmup: int, step: int) -> None:
    options = ScheduleOptions(lr_scheduler=name, lr_warmup_steps=warmup, lr_scheduler_num_cycles=3)
    assert 0.0 <= built_in_multiplier(options, total, 1e-3)(step) <= 1.0


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (25, 25), (0.1, 20), ("10%", 20), ("2.5 %", 5), ("0.5", 100), ("30", 30), (None, 0)]
)
def test_warmup_as_steps_share_or_percentage(value, steps: int) -> None:
    assert warmup_steps(value, 200) == steps


@pytest.mark.parametrize("value", [-1, 2.5, "ten", "120%", float("nan")])
def test_bad_warmup_is_refused(value) -> None:
    with pytest.raises(UserError, match="lr_warmup_steps"):
        warmup_steps(value, 200)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_scheduler": "cosin"}, "cosine"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler": "adafactor"}, "relative_step"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:x'"]}, "step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:5,nan'"]}, "0 or more"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='-1:5,1'"]}, "0 or more"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["cycles=2"]}, "num_cycles"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["cycles"]}, "key=value"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_end=1"]}, "learning_rate"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ["min_lr_ratio=3"]}, "min_lr_ratio"),
        ({"lr_scheduler_type": "CosineAnnealing"}, "CosineAnnealingLR"),
        ({"lr_scheduler_type": "no.such.Class"}, "no.such"),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "T_max"),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_warmup_steps": 3}, "lr_warmup_steps"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "measured loss"),
    ],
)
def test_refusals(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_schedule(ScheduleOptions(**options), sgd(1e-3), T)


@pytest.mark.parametrize(
    ("name", "argument", "words"),
    [
        ("StepLR", "step_size=0", "after step 1 of 40"),
        ("StepLR", "step_size='a'", "after step 1 of 40"),
        ("ExponentialLR", "gamma=-2", "is -5.*at step 39"),
        ("OneCycleLR", "max_lr=1e-3,total_steps=20", "after step 21 of 40"),
    ],
)
def test_a_class_that_fails_on_its_way_is_told_before_the_run(name: str, argument: str, words: str) -> None:
    options = ScheduleOptions(lr_scheduler_type=name, lr_scheduler_args=argument.split(","))
    with pytest.raises(UserError, match=words):
        table(options, sgd(1e-3), T)


def test_a_torch_class_advances_once_per_optimizer_step() -> None:
    optimizer = sgd(1e-3)
    options = ScheduleOptions(lr_scheduler_type="CosineAnnealingLR", lr_scheduler_args=["T_max=10"])
    schedule = create_schedule(options, optimizer, T)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "cosine", "lr_warmup_steps": 7},
        {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=40"]},
    ],
)
def test_state_restores_the_rate_exactly(options: dict) -> None:
    first = sgd(1e-4, 1e-3)
    schedule = create_schedule(ScheduleOptions(**options), first, T)
    for _ in range(13):
        first.step()
        schedule.step()
    second = sgd(1e-4, 1e-3)
    resumed = create_schedule(ScheduleOptions(**options), second, T)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(9):
        assert [g["lr"] for g in first.param_groups] == [g["lr"] for g in second.param_groups]
        for optimizer, running in ((first, schedule), (second, resumed)):
            optimizer.step()
            running.step()


def test_rates_are_named_by_their_groups() -> None:
    assert learning_rates(sgd(1e-4, 1e-3)) == [("lr/textencoder", 1e-4), ("lr/unet", 1e-3)]
    # only one part is trained: its own name, not that of the first of two
    assert learning_rates(sgd(2e-4, names=("unet",))) == [("lr/unet", 2e-4)]
    unnamed = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]}], lr=0.5)
    assert learning_rates(unnamed) == [("lr/group0", 0.5)]
    assert group_names(sgd(1e-4, 1e-3, 1e-3, names=("te", "block", "block"))) == ["te", "block", "block_group2"]


def test_adaptive_rates_are_shown_with_their_factor() -> None:
    pytest.importorskip("prodigyopt")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr_name": name} for name in ("a", "b", "c")]
    options = OptimizerOptions(optimizer_type="Prodigy", learning_rate=1.0)
    two, _ = create_optimizer(options, groups[:2], torch.device("cpu"))
    assert learning_rates(two)[-1] == ("lr/d*lr", 1e-6)
    assert [name for name, _ in learning_rates(two)] == ["lr/a", "lr/b", "lr/d*lr"]
    three, _ = create_optimizer(options, groups, torch.device("cpu"))
    assert [name for name, _ in learning_rates(three)][3:] == ["lr/d*lr/a", "lr/d*lr/b", "lr/d*lr/c"]


def test_adafactor_rate_is_the_one_that_it_uses() -> None:
    weight = torch.nn.Parameter(torch.full((8, 8), 0.5))
    options = OptimizerOptions(optimizer_type="AdaFactor", learning_rate=0)
    optimizer, _ = create_optimizer(options, [weight], torch.device("cpu"))
    schedule = create_schedule(ScheduleOptions(), optimizer, T)
    assert learning_rates(optimizer) == [("lr/group0", 0.0)]
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    schedule.step()
    moved = float((before - weight.detach()).abs().max())  # the first update has size 1 after its own clipping
    assert learning_rates(optimizer)[0][1] == pytest.approx(moved, rel=1e-3)


def test_table_tells_parameters_and_rates_without_touching_the_optimizer() -> None:
    optimizer = sgd(1e-4, 1e-3)
    options = ScheduleOptions(lr_scheduler="linear", lr_warmup_steps=10)
    rows = table(options, optimizer, 40)
    assert [(row.name, row.parameters, row.steps) for row in rows] == [
        ("textencoder", 3, (0, 10, 20, 39)),
        ("unet", 3, (0, 10, 20, 39)),
    ]
    assert rows[1].rates == pytest.approx((0.0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 30))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-3]
    lines = table_lines(rows)
    assert len(lines) == 3
    assert "step 39" in lines[0]
    by_class = ScheduleOptions(lr_scheduler_type="ExponentialLR", lr_scheduler_args=["gamma=0.5"])
    assert table(by_class, optimizer, 3)[1].rates == pytest.approx((1e-3, 5e-4, 2.5e-4))
