"""The peak memory of loading a whole checkpoint (U-Net, text encoder, VAE) over the memory that the models take.

The files, with random weights, are written to a temporary folder first: full size needs about 7 GB of disk and 5 GB
of memory. Each load is a process of its own; its imports do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import MEGABYTE, PeakMemory
from benchmarks.random_models import DTYPES, SIZES, random_module

ROOT = Path(__file__).resolve().parent.parent


def write_checkpoints(folder: Path, size: str, kinds: list[str]) -> None:
    """One Stability file for each number type, named after it."""
    from library.models import build
    from library.models.save import save_single_file

    spec = SIZES[size]
    modules = {
        "text_encoder": random_module(build.empty_text_encoder(spec.text_encoders[0])),
        "unet": random_module(build.empty_unet(spec.unet)),
        "vae": random_module(build.empty_vae(spec.vae)),
    }
    for kind in kinds:
        save_single_file(folder / f"{kind}.safetensors", spec, modules, DTYPES[kind])


def load(path: Path, kind: str) -> dict[str, float]:
    """Load a checkpoint as a training does: seconds, bytes of the models, and the peak above the start."""
    from library.families.sd import SdFamily
    from library.models import build
    from library.options import ModelOptions

    family = SdFamily()
    # what the first model of a process costs beside its weights (imports that are late) does not count
    random_module(build.empty_unet(SIZES["toy"].unet))
    random_module(build.empty_text_encoder(SIZES["toy"].text_encoders[0]))
    random_module(build.empty_vae(SIZES["toy"].vae))
    gc.collect()
    start = time.perf_counter()
    with PeakMemory() as memory:
        options = ModelOptions(pretrained_model_name_or_path=str(path))
        parts = family.load(options, dtype=DTYPES[kind], device="cpu")
    seconds = time.perf_counter() - start
    modules = (*parts.text_encoders, parts.unet, parts.vae)
    size_bytes = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    return {"seconds": seconds, "bytes": size_bytes, "peak": memory.above_start}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Peak memory of loading a checkpoint over the models' own size.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="toy: 3M parameters; full: SD 1.5")
    parser.add_argument("--folder", default=None, help="where the temporary files go, if not to the system's place")
    parser.add_argument("--inside", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(load(Path(arguments.inside[0]), arguments.inside[1])))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        writing = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})"]
        writing[-1] += "; from pathlib import Path; from benchmarks.loading import write_checkpoints"
        writing[-1] += f"; write_checkpoints(Path({temporary!r}), {arguments.size!r}, ['fp16', 'fp32'])"
        subprocess.run(writing, check=True, timeout=1800)  # in a process of its own, so that its memory is given back
        for stored in ("fp16", "fp32"):
            for wanted in ("fp16", "fp32"):
                command = [sys.executable, __file__, "--inside", f"{temporary}/{stored}.safetensors", wanted]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{stored} file to {wanted}: models {found['bytes'] / MEGABYTE:,.0f} MB, peak "
                    f"{found['peak'] / MEGABYTE:,.0f} MB, ratio {found['peak'] / found['bytes']:.3f} "
                    f"(target at most 1.15), {found['seconds']:.1f} s",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
