"""The time from the command to the first finished step of a toy training, or of a picture, over that of the imports.

Each turn is a process of its own. The imports are those that the program needs, in one line; the training loads the
tiny model of the examples, caches the latents of a few pictures and takes one step; the drawing takes one step too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Budget, Timings, Turn
from benchmarks.photos import write_photos

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = """
import accelerate
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
import networks.lora
import library.training.kinds.adapter
import library.training.session
import library.training.setup
print("imported", flush=True)
"""

DRAWING_IMPORTS = """
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
import library.generation.session
print("imported", flush=True)
"""
BUDGETS = {
    "training": Budget("time to the first step over the imports", 2),
    "drawing": Budget("time to the first picture over the imports", 2),
    "help": Budget("time of --help", 0.3, " s"),
}
DRAWING = "gen_img.py --ckpt examples/tiny/tiny-sd1.safetensors --prompt star --W 64 --H 64 --steps 2"


def until_line(command: list[str], beginning: str, limit_s: float = 300) -> Turn:
    """Start a program and wait for a line of its output; what it took until then. Then it is ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert running.stdout is not None
    seen: list[str] = []
    try:
        for line in running.stdout:
            seen.append(line)
            if line.startswith(beginning):
                wall, times = time.perf_counter() - start, psutil.Process(running.pid).cpu_times()
                return Turn(wall, times.user + times.system)
            if time.perf_counter() - start > limit_s:
                break
    finally:
        running.kill()
        running.wait()
    raise SystemExit(f"no line {beginning!r} came from {command[1]}:\n{''.join(seen)}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time to the first step or picture over the time of the imports.")
    parser.add_argument("--program", choices=sorted(BUDGETS), default="training", help="what is started")
    parser.add_argument("--rounds", type=int, default=3, help="measured pairs of starts")
    parser.add_argument("--warm_up", type=int, default=1, help="pairs before those, which fill the disk's cache")
    parser.add_argument("--images", type=int, default=4, help="pictures in the data set")
    arguments = parser.parse_args()
    if arguments.program == "help":
        return _measure_help(arguments.rounds)
    timings = Timings({"imports": [], arguments.program: []})
    with tempfile.TemporaryDirectory() as temporary:
        write_photos(Path(temporary) / "data" / "1_cat", arguments.images, (96, 96))
        line = (
            "train_network.py --pretrained_model_name_or_path examples/tiny/tiny-sd1.safetensors --train_data_dir "
            f"{temporary}/data --allow_captionless --output_dir {temporary}/out --network_module networks.lora "
            "--resolution 64 --train_batch_size 2 --cache_latents --max_train_steps 1 --learning_rate 1e-4 --seed 1"
        )
        imports, ready = IMPORTS, "steps: 1/1"
        if arguments.program == "drawing":
            line, imports, ready = f"{DRAWING} --outdir {temporary}/out", DRAWING_IMPORTS, "picture 1:"
        turns = {
            "imports": ([sys.executable, "-c", imports], "imported"),
            arguments.program: ([sys.executable, *line.split()], ready),
        }
        for number in range(-arguments.warm_up, arguments.rounds):
            for name, (command, beginning) in turns.items():
                turn = until_line(command, beginning)
                if number >= 0:
                    timings.turns[name].append(turn)
    print(timings.lines("imports"))
    print(BUDGETS[arguments.program].line(timings.ratios(arguments.program, "imports").processor))
    return 0


def _measure_help(rounds: int) -> int:
    """From the command to the first line of the answer, which is printed as a whole."""
    command = [sys.executable, "train_network.py", "--help"]
    turns = [until_line(command, "usage:") for _ in range(1 + rounds)][1:]
    wall, processor = (statistics.median(getattr(turn, kind) for turn in turns) for kind in Turn.__slots__)
    print(f"train_network.py --help: wall {wall:.3f} s, processor {processor:.3f} s, median of {rounds}")
    print(BUDGETS["help"].line(processor, "processor"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
