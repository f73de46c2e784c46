"""The speed of caching latents: our whole pass over picture files against the bare VAE on the same batches.

Ours reads, decodes and fits the pictures, encodes them, draws from the posterior and keeps or writes the latents. The
bare turn encodes the same batches, which are ready in memory. Both use one VAE with random weights.

B pictures, C channels, H W pixel height and width.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Budget, alternate
from benchmarks.photos import write_photos
from benchmarks.random_models import DTYPES, SIZES, random_module
from library.data.cache import LatentStore
from library.data.images import fit_pixels, read_image, to_model_range
from library.data.records import BucketRules, DatasetKind, DatasetSpec, ResolvedDataset, SubsetSpec
from library.data.sources import resolve
from library.models import build
from library.training.caching import cache_latents

BUDGET = Budget("caching latents, pictures a second over the bare VAE's", 0.9, at_least=True)


def find_photos(folder: Path, pixels: int, batch: int) -> tuple[ResolvedDataset, ...]:
    """The data set of a folder, every picture fitted to a square."""
    subsets = (SubsetSpec(str(folder), class_tokens="a photo"),)
    return resolve([DatasetSpec(DatasetKind.DREAMBOOTH, batch, BucketRules((pixels, pixels)), subsets)])


def ready_batches(datasets: tuple[ResolvedDataset, ...], batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The pictures as the VAE takes them, BCHW."""
    pairs = zip(datasets[0].records, datasets[0].fits, strict=True)
    pictures = [torch.from_numpy(fit_pixels(read_image(record.path), fit).pixels_HWC) for record, fit in pairs]
    batches = [torch.stack(pictures[start : start + batch]) for start in range(0, len(pictures), batch)]
    return [to_model_range(pixels_BHWC).to(dtype) for pixels_BHWC in batches]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of latent caching against the bare VAE encoder.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="width of the VAE; full: that of SD 1.5")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="type of the VAE")
    parser.add_argument("--pixels", type=int, default=256, help="side of the training size; the files are 1.5 times it")
    parser.add_argument("--images", type=int, default=8, help="pictures a turn")
    parser.add_argument("--batch", type=int, default=1, help="pictures that the VAE takes at once")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode ahead")
    parser.add_argument("--rounds", type=int, default=5, help="measured pairs of turns")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch: more than one disturb a busy machine")
    parser.add_argument("--to_disk", action="store_true", help="write the latents beside the pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, side, batch = DTYPES[arguments.dtype], arguments.pixels * 3 // 2, arguments.batch
    vae = random_module(build.empty_vae(SIZES[arguments.size].vae), dtype)
    with tempfile.TemporaryDirectory() as temporary:
        write_photos(Path(temporary) / "photos", arguments.images, (side, side))
        datasets = find_photos(Path(temporary) / "photos", arguments.pixels, batch)
        ready = ready_batches(datasets, batch, dtype)

        def bare() -> None:
            with torch.no_grad():
                for images_BCHW in ready:
                    vae.encode(images_BCHW).latent_dist.sample()

        def ours() -> None:
            for old in Path(datasets[0].records[0].path).parent.glob("*.npz"):
                old.unlink()
            store = LatentStore("sd", "random", to_disk=arguments.to_disk)
            cache_latents(
                datasets,
                vae,
                store,
                vae_batch_size=batch,
                device=torch.device("cpu"),
                dtype=dtype,
                workers=arguments.workers,
            )

        timings = alternate({"bare": bare, "ours": ours}, arguments.rounds)
    speed = timings.ratios("bare", "ours")
    print(timings.lines("bare"))
    print(f"pictures a second, ours over bare: wall {speed.wall:.3f}, processor {speed.processor:.3f}")
    place = "to disk" if arguments.to_disk else "in memory"
    case = f"{arguments.size}, {arguments.dtype}, {side * 2 // 3} px, batch {batch}, {place}"
    print(BUDGET.line(speed.processor, case))
    return 0


if __name__ == "__main__":
    sys.exit(main())
