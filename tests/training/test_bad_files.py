"""Wrong models and states, places that cannot be written, and numbers that are not finite."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from library.checkpoint import io
from library.training.latent_source import LatentSource
from tests.toy import write_toy_checkpoint
from tests.training.bench import Bench, refused
from tests.training.runs import tensors, train

# ---- models


class Dangerous:
    """Runs a command when it is unpickled without care."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def dangerous_zip(bench: Bench) -> Path:
    torch.save({"state_dict": {"x": torch.zeros(1)}, "more": Dangerous(bench.tmp / "ran")}, bench.tmp / "m.ckpt")
    return bench.tmp / "m.ckpt"


def dangerous_pickle(bench: Bench) -> Path:
    return bench.file("m.ckpt", pickle.dumps({"x": Dangerous(bench.tmp / "ran")}, protocol=2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda b: b.tmp / "gone.safetensors", ("--pretrained_model_name_or_path", "gone.safetensors")),
        (lambda b: b.file("m.safetensors", b.model.read_bytes()[:-999]), ("m.safetensors is cut short", "bytes")),
        (lambda b: b.file("m.safetensors", b.model.read_bytes()[:500]), ("m.safetensors is cut short", "header")),
        (lambda b: b.file("m.safetensors", b""), ("m.safetensors is empty",)),
        (lambda b: b.file("m.safetensors", b"no model at all"), ("m.safetensors is not a ", "safetensors file")),
        (lambda b: b.file("m.ckpt", b"no model at all"), ("m.ckpt is ", "copy or download it again")),
        (
            lambda b: write_toy_checkpoint(b.tmp / "m.safetensors", "sdxl"),
            ("m.safetensors is an SDXL model", "the same kind for SDXL"),
        ),
        (lambda b: b.header("m.safetensors", "lora_unet_x.lora_up.weight"), ("no whole Stable Diffusion model",)),
        (lambda b: b.photos, ("photos", "no whole Diffusers model")),
        (lambda b: b.model_sd2, ("is a Stable Diffusion 2.x model", "add --v2")),
        (dangerous_zip, ("m.ckpt is a pickle that could run code", ".safetensors")),
        (dangerous_pickle, ("m.ckpt is a pickle that could run code", ".safetensors")),
    ],
    ids=[
        "missing",
        "cut",
        "cut_header",
        "empty",
        "text",
        "text_ckpt",
        "sdxl",
        "lora",
        "folder",
        "sd2",
        "code_zip",
        "code",
    ],
)
def test_models(bench: Bench, make: Callable[[Bench], Path], words: tuple[str, ...]):
    refused(bench, (), *words, model=make(bench))
    assert not (bench.tmp / "ran").exists()


def test_sd1_with_v2(bench: Bench):
    refused(bench, ("--v2",), "is a Stable Diffusion 1.x model", "leave out --v2")


# ---- resuming


@pytest.fixture(scope="module")
def state(model, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train(model, photos, out, "--max_train_steps", "1", "--save_state") == 0
    return out / "toy-state"


def changed_json(**changes: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


@pytest.mark.parametrize(
    ("name", "change", "words", "late"),
    [
        ("state.json", lambda content: content[:200], ("state.json", "cannot be read"), False),
        ("state.json", lambda _: None, ("it is no state folder", "state.json is missing"), False),
        ("state.json", changed_json(format=99), ("another version", "format 99"), False),
        ("state.json", changed_json(files=[]), ("state.json is damaged",), False),
        ("state.json", changed_json(step="x"), ("state.json is damaged", "step is 'x'"), False),
        ("state.json", changed_json(step=-1), ("state.json is damaged", "step is -1"), False),
        ("state.json", changed_json(saved={"models": [], "states": ["x"]}), ("state.json is damaged",), False),
        (
            "state.json",
            changed_json(saved={"models": [["step", 1, "../kept.safetensors"]], "states": []}),
            ("state.json is damaged", "../kept.safetensors"),
            False,
        ),
        ("trainable.safetensors", lambda content: content[:-9], ("trainable.safetensors has", "bytes"), False),
        ("training.safetensors", lambda _: None, ("training.safetensors is missing", "earlier state"), False),
        ("training.json", lambda content: b"{}".ljust(len(content)), ("the state is damaged", "earlier state"), True),
    ],
)
def test_damaged_states(bench: Bench, state: Path, name: str, change, words: tuple[str, ...], late: bool):
    copy = bench.tmp / "state"
    shutil.copytree(state, copy)
    content = change((copy / name).read_bytes())
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    refused(bench, ("--resume", copy), f"--resume {copy}", *words, late=late)


def test_a_state_of_another_trainer(bench: Bench):
    bench.file("other/optimizer.bin", b"x")
    refused(bench, ("--resume", bench.tmp / "other"), "state of another trainer", "--network_weights")


def test_a_state_of_another_network_is_refused_with_its_differences(bench: Bench, state: Path):
    lines = bench.refusal("--resume", state, "--network_dim", "8", late=True)
    assert "--allow_mismatch" in lines[0]
    assert any("network_dim" in line and "8" in line for line in lines[1:])
    lines = bench.refusal("--resume", state, "--network_dim", "8", "--allow_mismatch", late=True)
    assert "does not fit this run" in lines[0]


# ---- places to write to


def test_a_file_where_a_folder_should_be(bench: Bench):
    file = bench.file("inway", "x")
    for place in (file, file / "deeper"):
        refused(bench, (), f"--output_dir {place}", "cannot write there", "choose another folder", out=place)
        refused(bench, ("--logging_dir", place), f"--logging_dir {place}", "cannot write there")


@pytest.fixture
def mounted() -> Iterator[Callable[..., bool]]:
    """Mounts for the length of a test; False where that is not allowed."""
    points: list[Path] = []

    def mount(point: Path, *words: str) -> bool:
        point.mkdir(exist_ok=True)
        try:
            done = subprocess.run(["mount", *words, str(point)], capture_output=True, timeout=20, check=False)
        except OSError:
            return False
        if done.returncode == 0 and point not in points:
            points.append(point)
        return done.returncode == 0

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", str(point)], capture_output=True, timeout=20, check=False)


def test_an_output_folder_without_permission(bench: Bench, mounted):
    folder = bench.tmp / "locked"
    folder.mkdir()
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        folder.chmod(0o500)
    elif not mounted(folder, "-t", "tmpfs", "-o", "ro,size=64k", "none"):
        pytest.skip("root writes everywhere, and mounting is not allowed here")
    refused(bench, (), f"--output_dir {folder}", "cannot write there", out=folder)


def test_a_disk_that_fills_up(bench: Bench, mounted):
    """Room for one model file and a bit: the second save fails, the first stays whole."""
    folder = bench.tmp / "small"
    if not mounted(folder, "-t", "tmpfs", "-o", "size=1m", "none"):
        pytest.skip("mounting a small disk is not allowed here")
    assert bench.run("--max_train_steps", "3", "--save_every_n_steps", "1", out=folder) == 1
    said = bench.capsys.readouterr().err
    assert "Traceback" not in said
    full = f"the disk is full: could not write {folder / 'toy-step00000002.safetensors'} "
    assert said.partition("error: ")[2].startswith(full)
    assert [path.name for path in folder.iterdir()] == ["toy-step00000001.safetensors"]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(folder / "toy-step00000001.safetensors").values())


def test_a_full_disk_while_a_state_is_written(bench: Bench, monkeypatch):
    """The state that was there before stays as it was, and nothing half written is left."""
    assert bench.run("--save_state") == 0
    before = {path.name: path.read_bytes() for path in (bench.out / "toy-state").iterdir()}
    original = io.tensor_bytes
    calls: list[int] = []

    def fill_up(value, cast):
        calls.append(1)
        if len(calls) > 1000:  # in the state, after the model
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(value, cast)

    monkeypatch.setattr(io, "tensor_bytes", fill_up)
    assert bench.run("--save_state", "--max_train_steps", "2", "--resume", bench.out / "toy-state") == 1
    assert "the disk is full" in bench.capsys.readouterr().err.partition("error: ")[2]
    assert {path.name: path.read_bytes() for path in (bench.out / "toy-state").iterdir()} == before
    assert not [path.name for path in bench.out.rglob("*") if "tmp" in path.name]


def test_an_output_name_that_exists_is_kept_under_a_number(bench: Bench):
    earlier = bench.file("out/toy.safetensors", b"the work of another day")
    assert bench.run() == 0
    assert "toy.safetensors existed before this run: kept as toy.old1.safetensors" in bench.capsys.readouterr().err
    assert (bench.out / "toy.old1.safetensors").read_bytes() == b"the work of another day"
    assert tensors(earlier)


# ---- numbers that are not finite


def poisoned(monkeypatch, name: str) -> None:
    """Latents of the image of that name are not numbers."""
    original = LatentSource.__call__

    def call(self, batch):
        latents_BCHW = original(self, batch)
        bad = torch.tensor([name in key for key in batch.keys])
        return torch.where(bad[:, None, None, None], torch.nan, latents_BCHW)

    monkeypatch.setattr(LatentSource, "__call__", call)


def test_nan_stops_the_run_and_names_the_file(bench: Bench, monkeypatch):
    poisoned(monkeypatch, "photo2")
    assert bench.run("--max_train_steps", "4", "--save_every_n_steps", "1") == 1
    said = bench.capsys.readouterr().err
    assert "loss is not finite" in said.partition("error: ")[2]
    assert str(bench.photos / "1_sks thing" / "photo2.png") in said
    assert "--on_nan skip" in said
    assert not (bench.out / "toy.safetensors").exists()
    for path in bench.out.glob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors(path).values())


def test_a_run_that_stopped_at_nan_goes_on_with_the_advice_that_it_gave(bench: Bench, monkeypatch):
    """Nothing that was learned before depends on --on_nan: the state was refused as that of another run."""
    poisoned(monkeypatch, "photo2")
    options = ("--max_train_steps", "4", "--save_every_n_steps", "1", "--save_state", "--seed", "5")
    assert bench.run(*options) == 1
    (*_, last) = sorted(bench.out.glob("*-state"))
    assert bench.run(*options, "--resume", last, "--on_nan", "skip") == 0


def test_nan_is_skipped_on_request_and_spoils_nothing(bench: Bench, monkeypatch):
    poisoned(monkeypatch, "photo2")
    assert bench.run("--max_train_steps", "4", "--on_nan", "skip") == 0
    said = bench.capsys.readouterr().err
    assert "step skipped; images: " + str(bench.photos / "1_sks thing" / "photo2.png") in said
    assert "1 steps were skipped" in said
    saved = tensors(bench.out / "toy.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
    assert max(float(tensor.abs().max()) for key, tensor in saved.items() if "lora_up" in key) > 1e-4


def test_a_learning_rate_that_blows_up_stops_before_the_model_is_written(bench: Bench):
    assert bench.run("--learning_rate", "1e30", "--max_train_steps", "3") == 1
    assert "not finite" in bench.capsys.readouterr().err.partition("error: ")[2]
    assert not list(bench.out.glob("*.safetensors"))
