"""Options that hand something on to a library: each reaches what it is for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from library.command import run_command
from library.log import UserError
from library.options import ConsoleOptions, LogOptions, LoopOptions, PrecisionOptions
from library.options.scripts import TRAIN_DB
from library.options.settings import ScriptOptions, Settings
from library.training import setup
from library.training.machine import open_machine
from library.training.script import Script
from library.training.trackers import Trackers
from tests.training.runs import SGD, command, difference, launch_two, metadata, train

# ---- processes


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """accelerate without what earlier tests set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerator_of(**values: Any) -> Any:
    settings = Settings(ScriptOptions("test", (LoopOptions, PrecisionOptions, LogOptions)), values, {})
    return open_machine(settings, Trackers(settings, "test")).accelerator


@pytest.mark.parametrize("name", ["gradient_as_bucket_view", "static_graph"])
def test_switches_of_distributed_training_reach_its_wrapper(fresh_state: None, name: str) -> None:
    assert accelerator_of(**{f"ddp_{name}": True}).ddp_handler.to_kwargs() == {name: True}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert accelerator_of().ddp_handler.to_kwargs() == {}


def test_the_time_that_processes_wait_is_in_minutes(fresh_state: None) -> None:
    assert accelerator_of(ddp_timeout=7).init_handler.timeout == timedelta(minutes=7)


def test_no_variable_of_the_environment_divides_gradients(fresh_state: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.nn.Parameter(torch.ones(()))
    accelerator_of().backward(weight * 2)
    assert weight.grad == 2


def test_a_deterministic_run_sets_what_cuda_asks_for(fresh_state: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "given")
    accelerator_of(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "given"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for deterministic, wanted in ((False, None), (True, ":4096:8")):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator_of(deterministic=deterministic)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == wanted
    torch.use_deterministic_algorithms(False)


def test_two_processes_with_these_switches_learn_the_same(model: Path, photos: Path, tmp_path: Path) -> None:
    """A static graph averages the gradients over the processes only if it finds the loss in what the step returns."""
    shared = ("--cache_latents", "--max_train_steps", "3", *SGD)  # the VAE rounds otherwise for two images at once
    switches = ("--ddp_gradient_as_bucket_view", "--ddp_static_graph", "--ddp_timeout", "4")
    done = launch_two("train_network.py", command(model, photos, tmp_path / "two", *shared, *switches))
    assert done.returncode == 0, done.stderr[-3000:]
    assert train(model, photos, tmp_path / "one", "--train_batch_size", "2", *shared) == 0
    assert difference(tmp_path / "one" / "toy.safetensors", tmp_path / "two" / "toy.safetensors") < 1e-3


# ---- messages

CONSOLE = ScriptOptions("test", (ConsoleOptions,))


def say_all(_: Settings) -> int:
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("library.somewhere"), level)(f"a word of {level}")
    return 0


@pytest.mark.parametrize(
    ("words", "heard"),
    [
        ((), ("info", "warning")),
        (("--console_log_level", "DEBUG"), ("debug", "info", "warning")),
        (("--console_log_level", "ERROR"), ()),
    ],
)
def test_the_level_of_messages(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], heard: tuple[str, ...]
) -> None:
    assert run_command(CONSOLE, say_all, [*words, "--console_log_simple"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert [line.rpartition(" ")[2] for line in said.out.splitlines()] == list(heard)


def test_messages_go_to_a_file_and_a_traceback_only_to_those_who_ask(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(settings: Settings) -> int:
        say_all(settings)
        raise UserError("this cannot be")

    file = tmp_path / "log.txt"
    for level in ("INFO", "DEBUG"):
        assert run_command(CONSOLE, fail, ["--console_log_file", str(file), "--console_log_level", level]) == 1
        said = capsys.readouterr()
        assert "a word of warning" in file.read_text()
        assert "a word of" not in said.err + said.out
        assert ("Traceback" in said.err) == (level == "DEBUG")
        assert said.err.endswith("error: this cannot be\n")


def test_a_full_memory_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fill_machine(_: Settings) -> int:
        return len(torch.empty(2**60, dtype=torch.uint8))

    def fill_device(_: Settings) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    for fill, word in ((fill_machine, "allocate"), (fill_device, "2.00 GiB")):
        assert run_command(CONSOLE, fill, [], "too little memory: use less") == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.startswith("error: too little memory: use less (")
        assert word in said
    with pytest.raises(RuntimeError):
        run_command(CONSOLE, lambda _: int(torch.ones(2) @ torch.ones(3)), [])


# ---- what never happens


@pytest.mark.parametrize("more", [("--dry_run",), ()])
def test_intervals_longer_than_the_run_are_told(
    model: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, more: tuple[str, ...]
) -> None:
    short = ("--max_train_steps", "2", "--save_every_n_steps", "2", "--save_every_n_epochs", "1")
    assert train(model, photos, tmp_path, *short, *more) == 0
    assert "has no effect" not in caplog.text
    assert train(model, photos, tmp_path, *short[:-3], "3", "--save_every_n_epochs", "2", *more) == 0
    assert "--save_every_n_steps 3 has no effect: the run has 2 steps" in caplog.text
    assert "--save_every_n_epochs 2 has no effect: the run has 1 epochs" in caplog.text


# ---- what is written of a run


def test_words_about_a_model_stand_in_its_file(model: Path, photos: Path, tmp_path: Path) -> None:
    told = {"title": "My Cat", "author": "me", "description": "a cat, grey", "license": "CC0-1.0", "tags": "cat, grey"}
    words = [word for name, text in told.items() for word in (f"--metadata_{name}", text)]
    assert train(model, photos, tmp_path / "told", *words, "--max_train_steps", "1") == 0
    assert train(model, photos, tmp_path / "silent", "--max_train_steps", "1") == 0
    written = [metadata(tmp_path / name / "toy.safetensors") for name in ("told", "silent")]
    assert {name: written[0][f"modelspec.{name}"] for name in told} == told
    assert [written[1].get(f"modelspec.{name}") for name in told] == ["toy", None, None, None, None]


# ---- compilation


@pytest.fixture
def unets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The U-Net of each run."""
    found: list[Any] = []
    original = setup.load_models

    def load_models(*arguments: Any) -> Any:
        models = original(*arguments)
        found.append(models.parts.unet)
        return models

    monkeypatch.setattr(setup, "load_models", load_models)
    return found


def test_compiled_blocks_learn_the_same(
    model: Path, photos: Path, tmp_path: Path, unets: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[Any] = set()
    original = torch.compile

    def compile_with(*given: Any, **named: Any) -> Any:
        used.add(named.get("backend"))
        return original(*given, **named)

    monkeypatch.setattr(torch, "compile", compile_with)
    shared = ("--max_train_steps", "2", *SGD)
    for name, backend in {"compiled": "eager", "off": "no"}.items():
        more = ("--torch_compile", "--dynamo_backend", backend)
        assert train(model, photos, tmp_path / name, *shared, *more) == 0
    assert used == {"eager"}
    compiled = [any(module._compiled_call_impl is not None for module in unet.modules()) for unet in unets]
    assert compiled == [True, False]
    assert difference(tmp_path / "compiled" / "toy.safetensors", tmp_path / "off" / "toy.safetensors") < 1e-3


def test_the_generator_compiles_when_told_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    from library.generation.app import run as generate
    from library.options.scripts import GEN_IMG

    asked: list[dict[str, Any]] = []  # the compiler itself would take minutes
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", lambda _, **how: asked.append(how))
    for name, more in {"plain": [], "compiled": ["--torch_compile"]}.items():
        words = ["--ckpt", str(model), "--outdir", str(tmp_path / name), "--prompt", "x", "--steps", "2"]
        assert generate(GEN_IMG, [*words, "--W", "64", "--H", "64", *more]) == 0
    assert asked == [{"dynamic": False}]


def test_a_graph_that_changes_is_not_static(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    db = Script(TRAIN_DB, kind="library.training.kinds.full:FullTraining", tracker_name="dreambooth")
    more = ("--ddp_static_graph", "--stop_text_encoder_training", "2")
    assert train(model, photos, tmp_path, *more, script=db) == 1
    assert "--ddp_static_graph and --stop_text_encoder_training exclude each other" in capsys.readouterr().err
