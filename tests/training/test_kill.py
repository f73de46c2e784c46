"""A run that is killed at any moment leaves whole files and a state from which the run ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from library.checkpoint import io
from library.training import loop, setup
from library.training.preview import Previewer
from library.training.state import read_run
from tests.training.runs import command, launch_two, metadata, tensors, train

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
OPTIONS = (
    "--max_train_steps", str(STEPS), "--save_every_n_steps", "1", "--save_state", "--lr_scheduler", "linear",
    "--save_last_n_steps_state", "1", "--network_args", "rank_dropout=0.1",
)  # fmt: skip
WATCHED = ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "rmdir"), (io, "tensor_bytes"))

needs_kill = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def unbroken(model, photos, tmp_path_factory) -> bytes:
    """The final file of a run that nobody disturbs."""
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        assert train(model, photos, out, *OPTIONS) == 0
    return (out / "toy.safetensors").read_bytes()


def watch(place: object, name: str, before: Callable[[], None]) -> None:
    """Let ``before`` be called ahead of each call of a function."""
    original = getattr(place, name)

    def call(*args: object, **more: object) -> object:
        before()
        return original(*args, **more)

    setattr(place, name, call)


def run_until(name: str, count: int, arguments: tuple[object, ...]) -> int:
    """Train in a process of its own, which kills itself ahead of the given call; returns how it ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = [0]

    def before() -> None:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 99
    try:
        place = next(place for place, watched in WATCHED if watched == name)
        watch(place, name, before)
        status = train(*arguments)  # type: ignore[arg-type]
    finally:
        os._exit(status)


def states_of(out: Path) -> list[Path]:
    """State folders under their final names, the newest last; every file under a final name is whole."""
    states: list[Path] = []
    for path in out.iterdir() if out.exists() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            read_run(path)
            states.append(path)
            assert all(tensors(file) for file in path.glob("*.safetensors"))
        else:
            assert all(bool(tensor.isfinite().all()) for tensor in tensors(path).values())
    return sorted(states, key=lambda path: read_run(path).step)


def go_on(model: Path, photos: Path, out: Path) -> bytes:
    """Resume from the newest state, or start again if there is none; returns the final file."""
    states = states_of(out)
    more = ("--resume", str(states[-1])) if states else ()
    assert train(model, photos, out, *OPTIONS, *more) == 0
    assert len(states_of(out)) >= 1
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]  # nothing half done stays behind
    return (out / "toy.safetensors").read_bytes()


@needs_kill
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tensor_bytes", 100),  # within the first model
        ("replace", 3),  # within the first state
        ("replace", 6),  # ahead of the first state's own name
        ("tensor_bytes", 3300),  # within the second state
        ("fsync", 36),  # the second state has its name
        ("rmdir", 1),  # while an old state is removed
    ],
)
def test_killed_at_an_exact_moment(model, photos, tmp_path, unbroken, name: str, count: int):
    out = tmp_path / "out"
    assert run_until(name, count, (model, photos, out, *OPTIONS)) == -signal.SIGKILL
    assert go_on(model, photos, out) == unbroken


def wait_for(found: Callable[[], bool], program: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert program.poll() is None, "the program ended before it could be killed"
        assert time.monotonic() < end, "the program is too slow"
        time.sleep(0.01)


@needs_kill
def test_a_killed_program_goes_on_from_its_newest_state(model, photos, tmp_path, unbroken):
    """The real program, killed at a moment that nobody chose while it saves after every step."""
    out = tmp_path / "out"
    more = ("--max_train_steps", "1000")
    words = [sys.executable, "train_network.py", *command(model, photos, out, *OPTIONS, *more)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_for(lambda: (out / "toy-step00000002-state").exists(), program, 120)
    finally:
        program.kill()
    assert program.wait(timeout=60) == -signal.SIGKILL
    newest = states_of(out)[-1]
    step = read_run(newest).step
    assert step >= 2
    longer = ("--max_train_steps", str(step + 1), "--allow_mismatch")  # the rate depends on the length of the run
    assert train(model, photos, out, *OPTIONS, *longer, "--resume", str(newest)) == 0
    assert metadata(out / "toy.safetensors")["ss_steps"] == str(step + 1)
    states_of(out)


# ---- Ctrl-C


def interrupt_after(monkeypatch, steps: int, times: int) -> None:
    """Press Ctrl-C that many times when the step is done, before it is counted."""
    original = loop.train_step

    def train_step(job, plan, batches):
        report = original(job, plan, batches)
        if job.clock.step + 1 == steps:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return report

    monkeypatch.setattr(loop, "train_step", train_step)


def test_ctrl_c_twice_stops_at_once(model, photos, tmp_path, unbroken, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, 2)
        assert train(model, photos, tmp_path, *OPTIONS) == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "stopped at once" in said
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in states_of(tmp_path)] == ["toy-step00000001-state"]
    assert go_on(model, photos, tmp_path) == unbroken


def test_ctrl_c_twice_in_the_middle_of_a_save_leaves_no_half_file(model, photos, tmp_path, monkeypatch):
    calls: list[int] = []
    original = io.tensor_bytes

    def tensor_bytes(value, cast):
        calls.append(1)
        if len(calls) == 100:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(value, cast)

    monkeypatch.setattr(io, "tensor_bytes", tensor_bytes)
    assert train(model, photos, tmp_path, *OPTIONS) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_before_the_first_step_stops_at_once(model, photos, tmp_path, monkeypatch, number):
    """Nothing is learned yet that could be saved, and caching a large data set takes an hour."""
    from library.training import prepare

    original = prepare.make_latents

    def make_latents(*arguments):
        os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(prepare, "make_latents", make_latents)
    assert train(model, photos, tmp_path, *OPTIONS) == 130
    assert list(tmp_path.glob("*.safetensors")) == []


def test_ctrl_c_while_the_last_preview_is_drawn_misses_nothing(model, photos, tmp_path, monkeypatch, capsys):
    """Model and state are uploaded and the report is written before the picture is begun."""
    events: list[str] = []

    def at_end(self, clock):
        events.append("preview")
        raise KeyboardInterrupt

    class FakeUploader:
        def upload(self, path: Path, *, wait: bool = False) -> None:
            events.append(f"upload {path.name}")

        def close(self) -> None:
            events.append("close")

    monkeypatch.setattr(Previewer, "at_end", at_end)
    monkeypatch.setattr(setup, "open_uploader", lambda options, machine: FakeUploader())
    hub = ("--huggingface_repo_id", "me/loras", "--save_state_on_train_end", "--save_state_to_huggingface")
    assert train(model, photos, tmp_path, "--max_train_steps", "1", *hub) == 130
    assert events == ["upload toy.safetensors", "upload toy-state", "close", "preview"]
    assert "average loss" in capsys.readouterr().err


def test_ctrl_c_in_one_of_two_processes_stops_both_after_the_same_step(model, photos, tmp_path):
    """A launcher passes the signal on to one process after the other: the first may be a step behind or ahead."""
    more = ("--network_module", "tests.training.stopping_network", "--max_train_steps", "50", "--ddp_timeout", "1")
    done = launch_two("train_network.py", command(model, photos, tmp_path, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    (state,) = states_of(tmp_path)
    assert read_run(state).step == 2
