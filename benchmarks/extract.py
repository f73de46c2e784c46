"""Extracting a network from two checkpoints: seconds, and the peak memory over the size of one of them.

The files, random weights in fp16, are written to a temporary folder first: SD 1.5 needs 4.5 GB of disk, SDXL 14 GB.
Both ways of finding singular values run one after the other on one thread; imports do not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import MEGABYTE, PeakMemory
from benchmarks.random_models import SDXL_SIZES, SIZES, write_quick_checkpoint
from library.checkpoint.io import LazyTensor, ModelFile, open_model_file, save_safetensors
from library.models.stream import open_model
from networks.editing.difference import Comparison
from networks.editing.extract import Extracted, ExtractPlan, extract


def write_tuned(original: Path, target: Path) -> None:
    """Every tensor as in the original but for one part in a hundred of noise."""
    with open_model_file(original) as file:
        save_safetensors(target, {key: _tuned(file, key) for key in file.infos})


def _tuned(file: ModelFile, key: str) -> LazyTensor:
    def read() -> Tensor:
        tensor = file.tensor(key)
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(key)))
        return (tensor.float() + 0.01 * noise / max(1, tensor.shape[-1] if tensor.dim() else 1) ** 0.5).to(tensor.dtype)

    info = file.infos[key]
    return LazyTensor(info.torch_dtype, info.shape, read)


def run(original: Path, tuned: Path, plan: ExtractPlan) -> Extracted:
    """What the tool does between its options and its report."""
    with open_model(original) as first, open_model(tuned) as second:
        return extract(Comparison(first, second), plan)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Seconds and peak memory of extracting a network from two models.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="toy, or full: the published size")
    parser.add_argument("--family", choices=("sd", "sdxl"), default="sd", help="SD 1.5 or SDXL")
    parser.add_argument("--rank", type=int, default=64, help="rank of the network (64)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = (SDXL_SIZES if options.family == "sdxl" else SIZES)[options.size]
    with tempfile.TemporaryDirectory() as folder:
        original, tuned = Path(folder) / "original.safetensors", Path(folder) / "tuned.safetensors"
        write_quick_checkpoint(original, spec, torch.float16)
        write_tuned(original, tuned)
        size_bytes = original.stat().st_size
        for name, exact in (("randomised", False), ("exact", True)):
            plan = ExtractPlan(options.rank, exact=exact, min_diff=0.0, dtype=torch.float16)
            start = time.process_time()
            with PeakMemory() as memory:
                done = run(original, tuned, plan)
            kept = sum(tensor.nbytes for own in done.modules.values() for tensor in own.values())
            print(
                f"{name}: {len(done.modules)} layers, {time.process_time() - start:.1f} s of the processor, peak "
                f"{memory.above_start / MEGABYTE:,.0f} MB ({kept / MEGABYTE:,.0f} MB of them the result), "
                f"{memory.above_start / size_bytes:.3f} of one checkpoint ({size_bytes / MEGABYTE:,.0f} MB)",
                *done.change.lines()[:2],
                sep="\n  ",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
