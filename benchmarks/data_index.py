"""The start of a large data set: from a folder of pictures with captions to the plan of the first epoch.

Each turn is a process of its own, so that nothing is remembered but what lies on the disk: the first turn finds every
picture, the later ones have the index that it wrote. Memory is counted above what the imports take.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import MEGABYTE, Budget, PeakMemory

BUDGETED_IMAGES = 20_000
BUDGETS = {
    name: Budget(f"opening {BUDGETED_IMAGES:,} pictures, {name} start, processor", limit, " s")
    for name, limit in (("first", 2.0), ("later", 0.5))
}
MEMORY_BUDGET = Budget(f"memory of opening {BUDGETED_IMAGES:,} pictures above the imports", 150, " MB")
SIZES = ((64, 64), (64, 96), (96, 64), (72, 64), (64, 80))
WORDS = ("cat", "grass", "sitting", "orange fur", "window", "close-up", "garden", "photo", "evening light", "sks")


def write_pictures(folder: Path, count: int) -> None:
    """``count`` small JPEG files of a few sizes, with a caption of about ten words each."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    files = [cv2.imencode(".jpg", random.integers(0, 256, (h, w, 3), dtype=np.uint8))[1].tobytes() for w, h in SIZES]
    for index in range(count):
        (folder / f"{index}.jpg").write_bytes(files[index % len(files)])
        (folder / f"{index}.txt").write_text(", ".join(random.permutation(WORDS)), "utf-8")


def open_data_set(parent: Path) -> dict[str, float]:
    """What a training does with its data before its first batch: seconds and bytes."""
    # they are late so that the process that only starts others does without; the figures leave them out
    from library.data.dataset import TrainImages
    from library.data.plan import plan_epoch
    from library.data.records import CaptionClock
    from library.data.sources import resolve
    from library.data.spec import load_dataset_specs
    from library.options import DataOptions
    from library.options.script import parse
    from library.options.scripts import TRAIN_NETWORK

    line = ["--pretrained_model_name_or_path", "unread", "--output_dir", "out", "--network_module", "networks.lora"]
    line += ["--train_data_dir", str(parent), "--resolution", "64", "--train_batch_size", "4", "--enable_bucket"]
    options = parse(TRAIN_NETWORK, [*line, "--min_bucket_reso", "32", "--bucket_reso_steps", "8"])[DataOptions]
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        datasets = resolve(load_dataset_specs(options))
        plan = plan_epoch(datasets, seed=1, epoch=1, processes=1, accumulation=1)
        TrainImages(datasets, None, seed=1).load(plan[0].micro_batches[0], 0, 1, CaptionClock(1, 0, len(plan)))
        seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    return {**seconds, "bytes": memory.above_start, "pictures": sum(len(one.records) for one in datasets)}


def _in_own_process(folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--inside", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time and memory of opening a large data set.")
    parser.add_argument("--images", type=int, default=BUDGETED_IMAGES, help="pictures, each with a caption file")
    parser.add_argument("--again", type=int, default=5, help="starts after the first")
    parser.add_argument("--inside", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(open_data_set(Path(arguments.inside))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        write_pictures(Path(temporary) / "1_cat", arguments.images)
        time.sleep(0.1)  # so that no file looks as if it were being written
        starts = [_in_own_process(temporary) for _ in range(1 + arguments.again)]
    for name, found in (("first", starts[:1]), ("later", starts[1:])):
        wall, processor = (statistics.median(start[kind] for start in found) for kind in ("wall", "processor"))
        largest = max(start["bytes"] for start in found) / MEGABYTE
        print(
            f"{name} start, {found[0]['pictures']:,} pictures: wall {wall:.2f} s, processor {processor:.2f} s "
            f"(median of {len(found)}), memory {largest:.0f} MB"
        )
        if arguments.images == BUDGETED_IMAGES:
            print(BUDGETS[name].line(processor), MEMORY_BUDGET.line(largest, f"{name} start"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
