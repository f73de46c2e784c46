"""Optimizers: names, arguments, checks, and one real step of each."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from library.log import UserError
from library.options import EmaOptions, LoopOptions, OptimizerOptions, ScheduleOptions
from library.options.settings import ScriptOptions, Settings
from library.training import preflight
from library.training.optimizers import (
    OptimizerMode,
    create_optimizer,
    is_schedule_free,
    parse_arguments,
    uses_relative_step,
)

CPU = torch.device("cpu")


def groups(lr_te: float | None = None, lr_unet: float | None = None) -> list[dict]:
    torch.manual_seed(0)
    # 64 x 64: the smallest size that bitsandbytes keeps in 8 bits
    rows = [("textencoder", lr_te), ("unet", lr_unet)]
    result = []
    for name, lr in rows:
        group = {"params": [torch.nn.Parameter(torch.randn(64, 64) * 0.1)], "lr_name": name}
        result.append(group if lr is None else {**group, "lr": lr})
    return result


def make(optimizer_type: str = "", parameter_groups: list | None = None, **options):
    chosen = OptimizerOptions(optimizer_type=optimizer_type, **{"learning_rate": 1e-3, **options})
    return create_optimizer(chosen, parameter_groups if parameter_groups is not None else groups(), CPU)


def step(optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for index in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach() * 0.5 + 0.01 * (index + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


NAMES = [
    ("", "torch.optim.adamw.AdamW"),
    ("adamw", "torch.optim.adamw.AdamW"),
    ("AdamW8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
    ("pagedadamw8bit", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
    ("Lion8bit", "bitsandbytes.optim.lion.Lion8bit"),
    ("SGDNesterov", "torch.optim.sgd.SGD(momentum=0.9)"),
    ("SGDNesterov8bit", "bitsandbytes.optim.sgd.SGD8bit(momentum=0.9)"),
    ("Lion", "lion_pytorch.lion_pytorch.Lion"),
    ("DAdaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"),
    ("DAdaptAdam", "dadaptation.dadapt_adam.DAdaptAdam"),
    ("DAdaptLion", "dadaptation.dadapt_lion.DAdaptLion"),
    ("dadaptsgd", "dadaptation.dadapt_sgd.DAdaptSGD"),
    ("DAdaptAdanIP", "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP"),
    ("Prodigy", "prodigyopt.prodigy.Prodigy"),
    ("AdaFactor", "transformers.optimization.Adafactor(relative_step=True)"),
    ("AdamWScheduleFree", "schedulefree.adamw_schedulefree.AdamWScheduleFree"),
    ("SGDScheduleFree", "schedulefree.sgd_schedulefree.SGDScheduleFree"),
    ("RAdamScheduleFree", "schedulefree.radam_schedulefree.RAdamScheduleFree"),
    ("RMSprop", "torch.optim.rmsprop.RMSprop"),
    ("nadam", "torch.optim.nadam.NAdam"),
    ("torch.optim.Adamax", "torch.optim.adamax.Adamax"),
]


@pytest.mark.parametrize(("name", "recorded"), NAMES)
def test_every_name_makes_its_class_and_moves_all_weights(name: str, recorded: str) -> None:
    package = recorded.split(".")[0]
    pytest.importorskip(package)
    rate = 1.0 if name.lower().startswith(("dadapt", "prodigy")) else 1e-3
    optimizer, text = make(name, learning_rate=rate)
    assert text == recorded
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    step(optimizer, 8)  # RAdam waits for some steps
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(after) == 2
    for old, new in zip(before, after, strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)
    assert [group["lr_name"] for group in optimizer.param_groups] == ["textencoder", "unet"]


@pytest.mark.parametrize("name", [name for name, _ in NAMES])
def test_every_name_passes_the_check_before_a_run(name: str) -> None:
    for package in [recorded.split(".")[0] for other, recorded in NAMES if other == name]:
        pytest.importorskip(package)
    groups_of_options = (OptimizerOptions, ScheduleOptions, LoopOptions, EmaOptions)
    preflight._check_optimizer(Settings(ScriptOptions("test", groups_of_options), {"optimizer_type": name}, {}))


def test_arguments_are_literals_split_at_the_first_equals_sign() -> None:
    parsed = parse_arguments(["betas=.9,.999", "text='a=b'", "flag=True", "nothing=None"], "optimizer_args")
    assert parsed == {"betas": (0.9, 0.999), "text": "a=b", "flag": True, "nothing": None}


def test_all_bad_arguments_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(["weight_decay", "eps=tiny", "amsgrad=true", "x=__import__('os')"], "optimizer_args")
    text = str(caught.value)
    assert all(item in text for item in ("weight_decay", "eps=tiny", "write True", "__import__", "--optimizer_args"))


def test_arguments_reach_the_optimizer_and_the_record() -> None:
    optimizer, text = make("AdamW", optimizer_args=["weight_decay=0.01", "betas=.9,.99"])
    assert text == "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))"
    assert optimizer.param_groups[1]["weight_decay"] == 0.01
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer_type": "AdmaW"}, ["AdamW"]),
        ({"optimizer_type": "Foo8bit"}, ["Foo8bit", "no such optimizer"]),
        ({"optimizer_type": "DAdaptFoo"}, ["DAdapt"]),
        ({"optimizer_type": "nowhere.to.Find"}, ["nowhere.to"]),
        ({"optimizer_type": "torch.optim.AdamWW"}, ["AdamW"]),
        ({"optimizer_type": "collections.OrderedDict"}, ["not an optimizer"]),
        ({"optimizer_type": "Lion", "use_8bit_adam": True}, ["one of them"]),
        ({"use_8bit_adam": True, "use_lion_optimizer": True}, ["one of them"]),
        ({"optimizer_type": "AdamW", "optimizer_args": ["weight_deacy=0.1"]}, ["weight_deacy", "weight_decay"]),
        ({"optimizer_type": "AdamW", "optimizer_args": ["betas=2,3"]}, ["AdamW", "beta"]),
        ({"optimizer_type": "AdamW", "optimizer_args": ["lr=1"]}, ["--learning_rate"]),
    ],
)
def test_refusals_are_one_line_that_helps(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(**options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["SGD8bit", "LARS8bit"])
def test_arguments_without_which_an_optimizer_cannot_be_are_heeded(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="momentum"):
        make(name)
    optimizer, _ = make(name, optimizer_args=["momentum=0.9"])
    step(optimizer)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(UserError, match="pip install lion-pytorch"):
        make("Lion")


def test_old_flags_are_aliases() -> None:
    assert make(use_lion_optimizer=True)[1].endswith(".Lion")
    pytest.importorskip("bitsandbytes")
    assert make(use_8bit_adam=True)[1].endswith(".AdamW8bit")


def test_adamw_is_fused_unless_a_gradient_scaler_must_see_skipped_steps() -> None:
    options = OptimizerOptions(learning_rate=1e-3)
    assert make()[0].param_groups[0]["fused"] is True
    scaled, _ = create_optimizer(options, groups(), CPU, loss_scaling=True)
    assert not scaled.param_groups[0]["fused"]
    assert not make(optimizer_args=["foreach=True"])[0].param_groups[0]["fused"]


def test_fused_adamw_follows_the_plain_formula() -> None:
    fast, slow = make()[0], make(optimizer_args=["foreach=False", "fused=False"])[0]
    step(fast, 5)
    step(slow, 5)
    for a, b in zip(fast.param_groups[0]["params"], slow.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_adafactor_relative_step_takes_no_rate_from_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        optimizer, _ = make("adafactor", groups(1e-4, 1e-3))
    assert uses_relative_step(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [None, None]
    assert "--unet_lr" in caplog.text
    fixed, text = make("adafactor", optimizer_args=["relative_step=False"])
    assert not uses_relative_step(fixed)
    assert text.endswith("(relative_step=False)")
    forced, _ = make("adafactor", optimizer_args=["relative_step=False", "warmup_init=True"])
    assert uses_relative_step(forced)


def test_adaptive_optimizers_check_their_rates(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make("Prodigy", learning_rate=1e-4)
    assert "about 1.0" in caplog.text
    with pytest.raises(UserError, match="one learning rate"):
        make("DAdaptAdam", groups(0.5, 1.0), learning_rate=1.0)
    make("Prodigy", groups(0.0, 1.0), learning_rate=1.0)


def test_plain_parameters_and_empty_groups() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer, _ = create_optimizer(OptimizerOptions(), iter([parameter]), CPU)
    assert optimizer.param_groups[0]["params"] == [parameter]
    with pytest.raises(UserError, match="nothing to train"):
        make(parameter_groups=[{"params": []}])


def test_the_callers_groups_stay_as_they_are() -> None:
    mine = groups(1e-4, 1e-3)
    make("adafactor", mine)
    assert [group["lr"] for group in mine] == [1e-4, 1e-3]


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_shows_other_weights_and_returns_bit_for_bit(name: str) -> None:
    pytest.importorskip("schedulefree")
    optimizer, _ = make(name, optimizer_args=["warmup_steps=0"] if name != "RAdamScheduleFree" else None)
    assert is_schedule_free(optimizer)
    step(optimizer, 6)
    mode, weight = OptimizerMode(optimizer), optimizer.param_groups[0]["params"][0]
    training = weight.detach().clone()
    with mode.evaluating():
        assert not torch.equal(weight, training)
    assert torch.equal(weight, training)
    step(optimizer, 1)  # still in training mode, or this raises


def test_mode_switch_does_nothing_for_ordinary_optimizers() -> None:
    optimizer, _ = make()
    assert not is_schedule_free(optimizer)
    weight = optimizer.param_groups[0]["params"][0]
    before = weight.detach().clone()
    with OptimizerMode(optimizer).evaluating():
        assert torch.equal(weight, before)
