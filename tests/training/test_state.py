"""Training states: a run that goes through files is bit for bit the unbroken one, and broken files are told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from library.log import UserError
from library.options import OptimizerOptions, ScheduleOptions
from library.training import state as state_module
from library.training.lr import create_schedule
from library.training.optimizers import create_optimizer
from library.training.state import RunState, load_state, read_run, save_state

T = 20
RUN = RunState(
    step=7,
    epoch=2,
    steps_in_epoch=3,
    max_train_steps=T,
    num_epochs=4,
    seed=42,
    session_id=2**31 + 5,
    started_at=1795357182.6256332,
    loss_history=(0.1, 1 / 3),
    fingerprint={"options": {"learning_rate": 1e-4}},
    saved={"models": [["epoch", 1, "a-000001.safetensors"]], "states": []},
)


class Run:
    """A toy run: three weights in two groups, gradients that depend on step and weights."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, args: list[str] | None = None, lr: float = 1e-2):
        generator = torch.Generator().manual_seed(1)
        shapes = {"down": (64, 80), "up": (80, 64), "alpha": (7,)}
        self.weights = {
            key: torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype))
            for key, shape in shapes.items()
        }
        groups = [
            {"params": [self.weights["down"], self.weights["alpha"]], "lr_name": "unet", "lr": lr},
            {"params": [self.weights["up"]], "lr_name": "textencoder"},
        ]
        options = OptimizerOptions(optimizer_type=name, learning_rate=lr, optimizer_args=args)
        self.optimizer, _ = create_optimizer(options, groups, torch.device("cpu"))
        self.schedule = create_schedule(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=3), self.optimizer, T)
        self.step_count = 0

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step_count)
            for weight in self.weights.values():
                noise = torch.randn(weight.shape, generator=generator)
                weight.grad = (weight.detach().float() * 0.3 + noise * 0.1).to(weight.dtype)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step_count += 1
        return self

    def save(self, folder: Path, **options) -> None:
        save_state(folder, RUN, self.weights, self.optimizer, self.schedule, **options)

    def load(self, folder: Path, **options) -> Run:
        load_state(folder, self.weights, self.optimizer, self.schedule, **options)
        self.step_count = RUN.step
        return self


CASES = [
    ("AdamW", None, 1e-2),
    ("AdamW", ["amsgrad=True", "foreach=False"], 1e-2),
    ("AdamW8bit", None, 1e-2),
    ("Lion8bit", None, 1e-3),
    ("Lion", None, 1e-3),
    ("Prodigy", ["use_bias_correction=True", "weight_decay=0.01"], 1.0),
    ("DAdaptAdam", None, 1.0),
    ("DAdaptAdanIP", None, 1.0),
    ("DAdaptLion", None, 1.0),
    ("AdaFactor", None, 1e-2),
    ("AdaFactor", ["relative_step=False", "scale_parameter=False", "beta1=0.9"], 1e-3),
    ("AdamWScheduleFree", ["warmup_steps=4"], 1e-2),
    ("RAdamScheduleFree", None, 1e-2),
    ("SGDScheduleFree", None, 1e-2),
    ("SGDNesterov", None, 1e-2),
    ("torch.optim.Rprop", None, 1e-2),
]
PACKAGES = {"AdamW8bit": "bitsandbytes", "Lion8bit": "bitsandbytes", "Lion": "lion_pytorch", "Prodigy": "prodigyopt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "args", "lr"), CASES)
def test_resumed_run_equals_the_unbroken_one_bit_for_bit(name: str, args, lr: float, dtype, tmp_path: Path) -> None:
    _need_package(name)
    unbroken = Run(name, dtype, args, lr).train(16)
    Run(name, dtype, args, lr).train(7).save(tmp_path / "first")
    second = Run(name, dtype, args, lr).load(tmp_path / "first").train(0)
    second.save(tmp_path / "again")
    resumed = Run(name, dtype, args, lr).load(tmp_path / "again").train(9)
    for key, weight in unbroken.weights.items():
        assert torch.isfinite(weight).all()
        assert torch.equal(weight, resumed.weights[key]), key
    for file in sorted(os.listdir(tmp_path / "first")):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def _need_package(name: str) -> None:
    package = PACKAGES.get(name)
    package = package or ("dadaptation" if name.startswith("DAdapt") else None)
    package = package or ("schedulefree" if name.endswith("ScheduleFree") else None)
    if package:
        pytest.importorskip(package)


def test_what_state_json_tells(tmp_path: Path) -> None:
    Run("AdamW").train(1).save(tmp_path / "s")
    assert read_run(tmp_path / "s") == RUN
    readable = json.loads((tmp_path / "s" / "state.json").read_text())
    assert readable["step"] == 7
    assert sorted(os.listdir(tmp_path / "s")) == [
        "state.json",
        "trainable.safetensors",
        "training.json",
        "training.safetensors",
    ]
    assert os.listdir(tmp_path) == ["s"]


def test_gradient_scaler_travels(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))
    scaler.update(512.0)
    Run("AdamW").train(2).save(tmp_path / "s", scaler=scaler)
    other = torch.amp.GradScaler("cpu")
    other.scale(torch.zeros(1))
    Run("AdamW").load(tmp_path / "s", scaler=other)
    assert other.get_scale() == 512.0
    assert other.state_dict() == scaler.state_dict()


def test_shared_tensors_are_kept_once(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = Run("AdamW8bit").train(2)
    run.save(tmp_path / "s")
    states = json.loads((tmp_path / "s" / "training.json").read_text())["optimizer"]["states"]
    tables = {json.dumps(entry["qmap1"]) for entry in states.values() if "qmap1" in entry}
    assert len(tables) == 1
    resumed = Run("AdamW8bit").load(tmp_path / "s")
    first, second = (resumed.optimizer.state[resumed.weights[key]]["qmap1"] for key in ("down", "up"))
    assert first.data_ptr() == second.data_ptr()


def test_changed_rates_win_when_asked(tmp_path: Path) -> None:
    Run("AdamW", lr=1e-2).train(7).save(tmp_path / "s")
    same = Run("AdamW", lr=1e-4).load(tmp_path / "s")
    changed = Run("AdamW", lr=1e-4).load(tmp_path / "s", keep_hyperparameters=True)
    ratio = same.optimizer.param_groups[0]["lr"] / changed.optimizer.param_groups[0]["lr"]
    assert ratio == pytest.approx(100)


def test_another_kind_of_schedule_goes_on_from_the_same_step(tmp_path: Path) -> None:
    halving = ScheduleOptions(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=1", "gamma=0.5"])
    Run("AdamW").train(RUN.step).save(tmp_path / "cosine")
    other = Run("AdamW")
    for group in other.optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")  # as if it had never had the other schedule
    other.schedule = create_schedule(halving, other.optimizer, T)
    other.load(tmp_path / "cosine", step=RUN.step, keep_hyperparameters=True)
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**RUN.step)
    other.train(1).save(tmp_path / "halving")
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5 ** (RUN.step + 1))
    back, usual = Run("AdamW"), Run("AdamW").train(RUN.step)
    back.load(tmp_path / "halving", step=RUN.step, keep_hyperparameters=True)
    assert back.optimizer.param_groups[0]["lr"] == usual.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("file", ["trainable.safetensors", "training.safetensors", "training.json"])
def test_cut_or_missing_files_are_named(file: str, tmp_path: Path) -> None:
    Run("AdamW").train(1).save(tmp_path / "s")
    target = tmp_path / "s" / file
    data = target.read_bytes()
    target.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=file):
        read_run(tmp_path / "s")
    target.unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        read_run(tmp_path / "s")


def test_folders_that_are_no_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such state folder"):
        read_run(tmp_path / "nothing")
    foreign = tmp_path / "at-step00000010-state"
    foreign.mkdir()
    with pytest.raises(UserError, match="no state folder"):
        read_run(foreign)
    (foreign / "optimizer.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="--network_weights"):
        read_run(foreign)
    (foreign / "state.json").write_text("[1")
    with pytest.raises(UserError, match="cannot be read"):
        read_run(foreign)
    (foreign / "state.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version"):
        read_run(foreign)


def test_a_state_of_another_shape_is_refused_with_names(tmp_path: Path) -> None:
    Run("AdamW").train(1).save(tmp_path / "s")
    with pytest.raises(UserError, match=r"of AdamW, this run uses SGD"):
        Run("SGD").load(tmp_path / "s")
    other = Run("AdamW")
    other.weights["extra"] = torch.nn.Parameter(torch.zeros(2))
    before = other.weights["down"].detach().clone()
    with pytest.raises(UserError, match="extra is missing in the state"):
        other.load(tmp_path / "s")
    assert torch.equal(other.weights["down"], before)
    with pytest.raises(UserError, match=r"float32|F32"):
        Run("AdamW", torch.bfloat16).load(tmp_path / "s")


def test_an_existing_state_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run("AdamW").train(1).save(tmp_path / "s")
    former = (tmp_path / "s" / "trainable.safetensors").read_bytes()
    (tmp_path / "s" / "left over").write_text("x")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "atomic_write_json", fail)
        with pytest.raises(UserError, match="the disk is full"):
            Run("AdamW").train(2).save(tmp_path / "s")
    assert (tmp_path / "s" / "trainable.safetensors").read_bytes() == former
    assert os.listdir(tmp_path) == ["s"]
    Run("AdamW").train(2).save(tmp_path / "s")
    assert (tmp_path / "s" / "trainable.safetensors").read_bytes() != former
    assert not (tmp_path / "s" / "left over").exists()
    assert os.listdir(tmp_path) == ["s"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    Run("AdamW").train(1).save(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / ".s.former")
    shutil.copytree(tmp_path / ".s.former", tmp_path / ".s.0123abcd.tmp")
    assert read_run(tmp_path / "s") == RUN
    Run("AdamW").train(1).save(tmp_path / "s")
    assert os.listdir(tmp_path) == ["s"]


def test_nothing_in_a_state_is_a_pickle(tmp_path: Path) -> None:
    Run("AdaFactor").train(2).save(tmp_path / "s")
    for file in (tmp_path / "s").iterdir():
        start = file.read_bytes()[:9]
        assert not start.startswith((b"\x80", b"PK"))
        assert start[:1] == b"{" or start[8:9] == b"{"
