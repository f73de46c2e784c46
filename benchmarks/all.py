"""Every budget of the project beside what is measured now: runs the other scripts one after another, prints one table.

Each script declares its own budgets and prints a line for each figure that has one; this one only collects them. The
small figures take about five minutes on a quiet machine, the full ones half an hour, 15 GB of memory and 25 GB of disk.
Nothing here is a test: the exit status is always 0, and a figure that misses its budget says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import BUDGET_MARK

HERE = Path(__file__).resolve().parent
HEADINGS = ("what", "measured", "budget", "share", "")
SMALL = (
    "startup.py --program help",
    "startup.py",
    "startup.py --program drawing",
    "train_step.py --pixels 64 --rounds 20",
    "train_step.py --pixels 64 --rounds 20 --batch 4",
    "train_step.py --pixels 64 --rounds 20 --dtype bf16",
    "generate.py",
    "generate.py --networks 10",
    "latent_caching.py",
    "latent_caching.py --to_disk",
    "data_index.py --again 3",
)
FULL = (
    "train_step.py --size full --rounds 4",
    "train_step.py --size full --rounds 9 --dtype bf16",
    "generate.py --size full",
    "generate.py --size full --networks 10",
    "latent_caching.py --size full --images 4 --rounds 3",
    "low_rank.py",
    "merge_memory.py --size full --family sd",
    "merge_memory.py --size full",
    "loading.py --size full",
    "loading.py --size full --family sdxl",
)


@dataclass(frozen=True)
class Done:
    """One script's run: the cells of its budget lines, seconds, and what went wrong if something did."""

    command: str
    rows: tuple[tuple[str, ...], ...]
    seconds: float
    problem: str = ""


def machine() -> str:
    """What the figures were measured on."""
    memory_gb = psutil.virtual_memory().total / 1e9
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {memory_gb:.0f} GB of memory, Python "
        f"{platform.python_version()}, torch {torch.__version__}, load {psutil.getloadavg()[0]:.1f} at the start"
    )


def run(command: str, limit_s: float) -> Done:
    """Run one script, showing what it prints. A failure is noted, so that the others still run."""
    print(f"\n$ python benchmarks/{command}", flush=True)
    script, *options = command.split()
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / script), *options],
            cwd=HERE.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return Done(command, (), limit_s, f"not finished after {limit_s:.0f} s")
    print(done.stdout, end="", flush=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(BUDGET_MARK)]
    rows = tuple(tuple(line.removeprefix(BUDGET_MARK).split(" | ")) for line in lines)
    problem = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Done(command, rows, time.perf_counter() - start, problem)


def table(runs: list[Done]) -> str:
    """All budgets as a Markdown table, then the scripts that gave none."""
    rows = [HEADINGS, *(row for done in runs for row in done.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*lines, *(f"{done.command}: {done.problem}" for done in runs if done.problem)])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Every budget beside what is measured now.")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="full: the published sizes as well")
    parser.add_argument("--only", default="", help="only commands that contain this")
    parser.add_argument("--limit_s", type=float, default=3600, help="seconds after which a script is given up")
    arguments = parser.parse_args()
    described = machine()
    commands = [*SMALL, *(FULL if arguments.size == "full" else ())]
    runs = [run(command, arguments.limit_s) for command in commands if arguments.only in command]
    judged = [row[-1] for done in runs for row in done.rows]
    print(f"\n{described}; {sum(done.seconds for done in runs) / 60:.0f} minutes in all\n\n{table(runs)}")
    print(f"\n{judged.count('met')} met, {judged.count('missed')} missed, {sum(bool(d.problem) for d in runs)} not run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
