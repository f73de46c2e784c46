"""The scripts of the tools, started as a user starts them: help at once, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.house.source_map import ROOT

SCRIPTS = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "networks").glob("*.py")
    if "__main__" in path.read_text("utf-8")
}


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_is_light(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), "--help"],
        cwd=ROOT.anchor,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"usage: {script}")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "library.command" in imported
    assert not imported & {"torch", "numpy", "transformers", "diffusers"}


def test_there_are_scripts() -> None:
    assert {"networks/resize_lora.py", "networks/extract_lora_from_models.py"} <= SCRIPTS


def test_a_reader_that_has_enough_ends_the_program_quietly(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, file, {f"key{i}": "x" * 1000 for i in range(500)})
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "show_metadata.py"), "--model", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.read(10)
    program.stdout.close()  # as head does
    assert program.stderr.read() == b""
    assert program.wait(timeout=120) == 0
