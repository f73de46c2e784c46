"""The scripts of the tools, started as a user starts them: help at once, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
