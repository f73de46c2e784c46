"""The peak memory and time of merging a LoRA into a whole checkpoint: tensor by tensor, and by loading the model.

The model and the LoRA, with random weights, are written to a temporary folder first: SDXL in fp16 needs 21 GB of disk,
and the way that loads the model 8 GB of memory; SD 1.5 7 GB and 3 GB. Each turn is a process of its own; its imports do
not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import MEGABYTE, Budget, PeakMemory, timed
from benchmarks.random_models import SDXL_SIZES, SIZES, write_quick_checkpoint
from library.models.spec import ArchitectureSpec
from library.models.stream import open_model
from networks.editing.layers import model_layers
from networks.weights import write_weights

WAYS = ("streamed", "whole model")
BUDGET = Budget("peak memory of merging a LoRA over the checkpoint", 1.2)


def write_network(path: Path, model: Path, spec: ArchitectureSpec, rank: int) -> None:
    """A LoRA with random weights on all layers that LoRA has without convolutions, fp16."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    with open_model(model) as opened:
        for layer in model_layers(spec):
            shape = opened.parts[layer.folder][f"{layer.path}.weight"].shape
            if layer.part == "unet" and ".attentions." not in layer.path:
                continue
            down = torch.randn((rank, *shape[1:]), generator=generator, dtype=torch.float32) * 0.01
            up = torch.randn((shape[0], rank, *shape[2:]), generator=generator) * 0.01
            own = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(rank))}
            tensors |= {f"{layer.name}.{name}": tensor.half() for name, tensor in own.items()}
    write_weights(path, tensors, None, {})


def streamed(model: Path, network: Path, target: Path) -> None:
    """As the tool does it."""
    from networks import merge_lora

    options = ["--sd_model", model, "--models", network, "--ratios", "0.8", "--save_to", target]
    status = merge_lora.main([str(word) for word in (*options, "--save_precision", "fp16")])
    if status:
        raise SystemExit(status)


def whole_model(model: Path, network: Path, target: Path) -> None:
    """Load the model, merge into its layers, save it: how most programs do it."""
    from library.families import family_named
    from library.models.load import recognise
    from library.options import ModelOptions
    from networks import lora

    family = family_named(recognise(model).spec.family)
    parts = family.load(ModelOptions(pretrained_model_name_or_path=str(model)), dtype=torch.float16)
    views = family.adapter_views(parts)
    encoders: Any = views.text_encoders if len(views.text_encoders) > 1 else views.text_encoders[0]
    made, weights = lora.create_network_from_weights(0.8, str(network), None, encoders, views.unet)
    made.merge_to(encoders, views.unet, weights, torch.float32, "cpu")
    family.save_checkpoint(parts, target, torch.float16)


def measure(way: str, model: Path, network: Path, target: Path) -> dict[str, float]:
    """One merge: seconds on the clock and of the processor, and the peak of memory above the start, in bytes."""
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:  # late imports do not count
        small, small_network = Path(temporary) / "toy.safetensors", Path(temporary) / "net.safetensors"
        write_quick_checkpoint(small, SDXL_SIZES["toy"], torch.float16)
        write_network(small_network, small, SDXL_SIZES["toy"], 4)
        _merge(way, small, small_network, Path(temporary) / "out.safetensors")
    with PeakMemory() as memory:
        turn = timed(lambda: _merge(way, model, network, target))
    return {"wall": turn.wall, "processor": turn.processor, "peak": memory.above_start}


def _merge(way: str, model: Path, network: Path, target: Path) -> None:
    (streamed if way == WAYS[0] else whole_model)(model, network, target)


def largest_difference(one: Path, other: Path) -> float:
    """Between the merged files, over all tensors that both have."""
    with open_model(one) as first, open_model(other) as second:
        differences = [
            float((value.read().float() - second.parts[part][key].read().float()).abs().max())
            for part, tensors in first.parts.items()
            for key, value in tensors.items()
        ]
    return max(differences)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Peak memory and time of merging a LoRA into a checkpoint.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="toy: 3M parameters; full: published")
    parser.add_argument("--family", choices=("sd", "sdxl"), default="sdxl", help="sd: SD 1.5")
    parser.add_argument("--rank", type=int, default=64, help="rank of the LoRA")
    parser.add_argument("--folder", default=None, help="where the temporary files go, if not to the system's place")
    parser.add_argument("--only_streamed", action="store_true", help="leave out the way that loads the model")
    parser.add_argument("--inside", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        way, *paths = arguments.inside
        print(json.dumps(measure(way, *(Path(path) for path in paths))))
        return 0
    spec = (SDXL_SIZES if arguments.family == "sdxl" else SIZES)[arguments.size]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        model, network = Path(temporary) / "model.safetensors", Path(temporary) / "net.safetensors"
        write_quick_checkpoint(model, spec, torch.float16)
        write_network(network, model, spec, arguments.rank)
        size = model.stat().st_size
        print(f"checkpoint {size / MEGABYTE:,.0f} MB, LoRA {network.stat().st_size / MEGABYTE:,.0f} MB", flush=True)
        targets = [Path(temporary) / f"{number}.safetensors" for number in range(len(WAYS))]
        ways = WAYS[:1] if arguments.only_streamed else WAYS
        for way, target in zip(ways, targets, strict=False):
            command = [sys.executable, __file__, "--inside", way, str(model), str(network), str(target)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{way}: peak {found['peak'] / MEGABYTE:,.0f} MB, {found['peak'] / size:.3f} of the checkpoint, "
                f"{found['wall']:.1f} s, processor {found['processor']:.1f} s",
                flush=True,
            )
            if way == WAYS[0] and arguments.size == "full":
                print(BUDGET.line(found["peak"] / size, arguments.family), flush=True)
        if len(ways) > 1:
            print(f"largest difference of the merged weights: {largest_difference(*targets):.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
