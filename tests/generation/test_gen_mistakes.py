"""Command lines of gen_img.py that are wrong, or interrupted: what is said, and what is drawn all the same."""

from __future__ import annotations

import io
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.checkpoint.io import WriteError
from library.command import run_command
from library.generation import output
from library.generation.app import run
from library.generation.denoise import Denoising
from library.generation.lines import parse_line
from library.options.script import parse
from library.options.scripts import GEN_IMG, SDXL_GEN_IMG, SHOW_METADATA
from tests.generation.test_gen_img import SHORT, draw, entries, lines, pixels
from tests.toy import write_toy_checkpoint

GPU_FULL = "CUDA out of memory. Tried to allocate 20.00 GiB"
CPU_FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy.safetensors", "sd1")


def prompts(made: list[Path]) -> list[str]:
    return [entries(path)["prompt"] for path in made]


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The first picture cannot be drawn."""
    original, left = Denoising.run, [error]

    def drawing(self: Denoising, latents: Any) -> Any:
        if left:
            raise left.pop()
        return original(self, latents)

    monkeypatch.setattr(Denoising, "run", drawing)


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while each picture is drawn."""
    original = Denoising.run

    def drawing(self: Denoising, latents: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, latents)

    monkeypatch.setattr(Denoising, "run", drawing)


# ---- memory


@pytest.mark.parametrize("text", [GPU_FULL, CPU_FULL])
def test_full_memory_of_a_device_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: object) -> int:
        raise RuntimeError(text)

    file = tmp_path / "x.safetensors"
    file.touch()
    assert run_command(SHOW_METADATA, work, ["--model", str(file)], "out of memory: use less") == 1
    assert capsys.readouterr().err == "error: out of memory: use less\n"


def test_other_errors_of_the_program_are_not_called_so(tmp_path: Path) -> None:
    def work(_: object) -> int:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        run_command(SHOW_METADATA, work, ["--model", str(tmp_path)])


def test_a_picture_too_large_for_the_memory_does_not_end_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_once(monkeypatch, RuntimeError(GPU_FULL))
    file = lines(tmp_path, "large --w 128 --d 1", "small --d 2")
    assert prompts(draw(model, tmp_path / "out", "--from_file", str(file), status=1)) == ["small"]
    assert "large --w 128 --d 1: out of memory at 128x64 pixels" in caplog.text


# ---- pictures that are drawn again


def again(model: Path, out: Path, *more: str, status: int = 0) -> list[Path]:
    assert run(GEN_IMG, ["--ckpt", str(model), "--outdir", str(out), *more]) == status
    return sorted(out.glob("*.png"))


# ---- told early

# ---- the keyboard, files and modules


# ---- lines and options
