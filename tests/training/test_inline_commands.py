"""Commands that the documents name in tables and sentences: their scripts run, and know the options.

Most are measurements. Each script runs once, at the smallest size that shows that it works; ``NOT_RUN`` says why a
command does not. What would be a process of its own runs in this one. A new command needs a row.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.all import FULL, SMALL
from tests.guides import (
    DOCUMENTS,
    Row,
    assert_accepted,
    check_command,
    commands_of,
    inline_commands,
    run_here,
    script_and_options,
)
from tests.house.source_map import ROOT

TOY = "--size toy"
ONCE = "--size toy --pixels 64 --rounds 1"
RUN = (
    Row("train_step.py --size full --dtype bf16 --rank 64 --rounds 3", says="toy, bf16, 64 px, batch 1 |", more=ONCE),
    Row(
        "latent_caching.py --size full --images 4 --rounds 3 --dtype bf16",
        says="toy, bf16, 64 px, batch 1, to disk |",
        more=f"{ONCE} --images 2 --to_disk",
    ),
    Row("data_index.py --images 5000", says="later start, 20 pictures", more="--images 20 --again 1"),
    Row("startup.py", says="time to the first step over the imports |", more="--rounds 1 --warm_up 0 --images 2"),
    Row("startup.py --program drawing", says="to the first picture over the imports |", more="--rounds 1 --warm_up 0"),
    Row("generate.py --size full", says="64 px, 2 networks merged |", more=f"{ONCE} --steps 2 --networks 2 --rank 2"),
    Row(
        "memory.py --size full --pixels 512 --by_operation",
        says="MB  ScaledDotProduct",
        more=f"{TOY} --pixels 64 --rank 4 --steps 1 --rows 'LoRA, cached text'",
    ),
    Row("loading.py --size full --family sdxl", says="fp16 folder to file: models", more=TOY),
    Row("merge_memory.py --size full --family sd", says="largest difference of the merged weights: 0", more=TOY),
    Row(
        "low_rank.py --extraction",
        says="merging two by thin decompositions",
        more="--models toy --rank 4 --new_rank 2",
    ),
    Row("extract.py --size full", says="exact: ", more=f"{TOY} --rank 2"),
    Row("benchmarks/networks.py --size full", says="LoKr, factor 8 ", more=f"{ONCE} --rank 4 --rows 'LoKr, factor 8'"),
)
ANOTHER = "its script runs in another row"
NOT_RUN = {
    "python benchmarks/train_step.py --size full --rounds 4": ANOTHER,
    "python benchmarks/train_step.py --size full --dtype bf16 --rounds 9": ANOTHER,
    "python benchmarks/train_step.py --pixels 64": ANOTHER,
    "python benchmarks/train_step.py --pixels 64 --batch 4": ANOTHER,
    "python benchmarks/train_step.py --pixels 64 --dtype bf16 --rounds 30": ANOTHER,
    "python benchmarks/latent_caching.py": ANOTHER,
    "python benchmarks/latent_caching.py --to_disk": ANOTHER,
    "python benchmarks/latent_caching.py --batch 4": ANOTHER,
    "python benchmarks/latent_caching.py --size full --images 4 --rounds 3": ANOTHER,
    "python benchmarks/data_index.py": ANOTHER,
    "python benchmarks/data_index.py --images 80000": ANOTHER,
    "python benchmarks/generate.py": ANOTHER,
    "python benchmarks/memory.py --size full": ANOTHER,
    "python benchmarks/memory.py --size full --pixels 512 --rows LLLite": ANOTHER,
    "python benchmarks/loading.py --size full": ANOTHER,
    "python benchmarks/low_rank.py": ANOTHER,
    "python benchmarks/merge_memory.py --size full": ANOTHER,
    "python benchmarks/extract.py --size full --family sdxl": ANOTHER,
    "python tools/make_scenes.py --count 120": "made examples/shapes; a block of the same page runs the tool",
    "gen_img.py --network_weights a.safetensors b.safetensors": "half a command; tests/generation draw with two files",
    "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 train_network.py ...": "half a command",
}


def bare(command: str) -> str:
    """Script and options alone."""
    script, options = script_and_options(command)
    return " ".join((script, *options))


IN_BLOCKS = {bare(command) for document in DOCUMENTS for command in commands_of(document)}
INLINE = list(dict.fromkeys(command for document in DOCUMENTS for command in inline_commands(document)))


REAL_RUN, REAL_POPEN = subprocess.run, subprocess.Popen


class _Ended:
    """What subprocess.Popen gives, of a program that has run to its end in this process."""

    def __init__(self, command: list[str]) -> None:
        self.stdout: Iterator[str] = iter(run_here(command).splitlines())
        self.pid = os.getpid()

    def kill(self) -> None:
        """Nothing is left to end."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


def _runs_here(command: Any) -> bool:
    return isinstance(command, list) and command[:1] == [sys.executable]


def _run(command: Any, *words: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
    if _runs_here(command):
        return subprocess.CompletedProcess(command, 0, run_here(command), "")
    return REAL_RUN(command, *words, **settings)


def _start(command: Any, *words: Any, **settings: Any) -> Any:
    return _Ended(command) if _runs_here(command) else REAL_POPEN(command, *words, **settings)


def rows_of(command: str) -> list[Row]:
    """The rows that speak of a command."""
    return [row for row in RUN if command.endswith(row.end)]


def test_every_inline_command_stands_in_one_table() -> None:
    for command in INLINE:
        found = len(rows_of(command)) + (command in NOT_RUN) + (bare(command) in IN_BLOCKS)
        assert found == 1, f"{command}: {found} rows in RUN, NOT_RUN and the blocks of the documents"
    assert not [row.end for row in RUN if not any(command.endswith(row.end) for command in INLINE)]
    assert not NOT_RUN.keys() - INLINE


def test_every_benchmark_runs_once() -> None:
    programs = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")}
    run = {Path(script_and_options(command)[0]).name for command in INLINE if rows_of(command)}
    assert programs == run | {"all.py"}, "all.py runs in tests/training/test_guides.py"


@pytest.mark.parametrize("command", [*INLINE, *(f"python benchmarks/{command}" for command in (*SMALL, *FULL))])
def test_scripts_know_the_options(command: str) -> None:
    assert_accepted(command)


def test_an_unknown_option_is_seen() -> None:
    for command in ("python benchmarks/loading.py --rank 4", "gen_img.py --ckp a", "python tools/canny.py --thres3 1"):
        with pytest.raises(AssertionError):
            assert_accepted(command)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the examples; Python programs run in this process. The number of torch's threads comes back."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    with mock.patch.object(subprocess, "run", _run), mock.patch.object(subprocess, "Popen", _start):
        yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("row", RUN, ids=lambda row: row.end)
def test_a_small_run_works(row: Row, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [command for command in INLINE if command.endswith(row.end)]
    started = time.process_time()
    check_command(command, row, folder, lambda: "".join(capsys.readouterr()))
    with capsys.disabled():
        print(f"{time.process_time() - started:5.1f} s of a core: {command} {row.more}")
