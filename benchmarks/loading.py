"""The peak memory of loading and of converting a whole checkpoint over the memory that its models take.

The files, with random weights, are written to a temporary folder first: SD 1.5 needs about 7 GB of disk and 5 GB of
memory, SDXL 14 GB of disk and 15 GB of memory. Each turn is a process of its own; its imports do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import MEGABYTE, Budget, PeakMemory
from benchmarks.random_models import DTYPES, SDXL_SIZES, SIZES, quick_module, write_quick_checkpoint
from library.models import build

if TYPE_CHECKING:
    from library.families.base import ModelFamily

TURNS = {  # (the file's type, the type in memory) of the loads; conversions have one type for both
    "sd": (("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp16"), ("fp32", "fp32")),
    "sdxl": (("fp16", "bf16"), ("fp16", "fp16"), ("fp16", "fp32")),
}

BUDGET = Budget("peak memory of loading or converting over the models", 1.15)


def measure(family_name: str, source: Path, kind: str, converted: Path | None = None) -> dict[str, float]:
    """Load a model as a training does, and write it in the other layout if asked for: seconds, bytes of the models, and
    the peak above the start.
    """
    from library.options import ModelOptions

    family = _family(family_name)
    _warm_up()
    start = time.perf_counter()
    with PeakMemory() as memory:
        options = ModelOptions(pretrained_model_name_or_path=str(source))
        parts = family.load(options, dtype=DTYPES[kind], device="cpu")
        if converted and source.is_dir():
            family.save_checkpoint(parts, converted, DTYPES[kind])
        elif converted:
            family.save_diffusers(parts, converted, DTYPES[kind])
    seconds = time.perf_counter() - start
    size_bytes = sum(tensor.nbytes for module in parts.modules() for tensor in module.state_dict().values())
    return {"seconds": seconds, "bytes": size_bytes, "peak": memory.above_start}


def _family(name: str) -> ModelFamily:
    if name == "sd":
        from library.families.sd import SdFamily

        return SdFamily()
    from library.families.sdxl import SdxlFamily

    return SdxlFamily()


def _warm_up() -> None:
    """What the first model of a process costs beside its weights (imports that are late) does not count."""
    spec = SIZES["toy"]
    for module in (build.empty_unet(spec.unet), build.empty_text_encoder(spec.text_encoders[0])):
        quick_module(module)
    quick_module(build.empty_vae(spec.vae))
    gc.collect()


def _turn(arguments: argparse.Namespace, title: str, *inside: str) -> None:
    """One turn in a process of its own, and its line."""
    command = [sys.executable, __file__, "--family", arguments.family, "--inside", *inside]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{title}: models {found['bytes'] / MEGABYTE:,.0f} MB, peak {found['peak'] / MEGABYTE:,.0f} MB, ratio "
        f"{found['peak'] / found['bytes']:.3f}, {found['seconds']:.1f} s",
        flush=True,
    )
    if arguments.size == "full":  # the allocator's own pages are larger than a toy
        print(BUDGET.line(found["peak"] / found["bytes"], f"{arguments.family}, {title}"), flush=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Peak memory of loading and converting over the models' own size.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="toy: 3M parameters; full: published")
    parser.add_argument("--family", choices=sorted(TURNS), default="sd", help="sd: SD 1.5")
    parser.add_argument("--folder", default=None, help="where the temporary files go, if not to the system's place")
    parser.add_argument("--inside", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        source, kind, *converted = arguments.inside
        target = Path(converted[0]) if converted else None
        print(json.dumps(measure(arguments.family, Path(source), kind, target)))
        return 0
    spec = (SIZES if arguments.family == "sd" else SDXL_SIZES)[arguments.size]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for stored in ("fp16", "fp32"):
            wanted = [kind for one, kind in TURNS[arguments.family] if one == stored]
            if not wanted:
                continue
            file, folder = f"{temporary}/{stored}.safetensors", f"{temporary}/{stored}"
            write_quick_checkpoint(Path(file), spec, DTYPES[stored])
            for kind in wanted:
                _turn(arguments, f"{stored} file to {kind}", file, kind)
            _turn(arguments, f"{stored} file to folder", file, stored, folder)
            Path(file).unlink()
            _turn(arguments, f"{stored} folder to file", folder, stored, file)
            Path(file).unlink()
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
