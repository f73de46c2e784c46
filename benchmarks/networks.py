"""What each type of network costs: parameters that learn, bytes kept for the backward pass, and time over LoRA.

One U-Net with random weights is shared. Each network is attached, makes a forward and a backward pass, and comes off
again; the turns alternate, so that a busy machine slows all alike. A further network is a line in `ROWS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import MEGABYTE, SavedBytes, alternate
from benchmarks.random_models import DTYPES, SIZES, quick_module
from library.models import build
from library.models.memory import keep_less_for_backward
from library.options.values import split_pairs
from library.plugin import load_network_module

ROWS = {
    "LoRA": "networks.lora",
    "LoRA-FA": "networks.lora_fa",
    "DyLoRA, unit 4": "networks.dylora unit=4",
    "LoRA, 3x3 too": "networks.lora conv_dim=16",
    "LoRA-FA, 3x3 too": "networks.lora_fa conv_dim=16",
    "OFT, 16 blocks, attention": "networks.oft",
    "LoRA in Tucker form, 3x3 too": "networks.lora conv_dim=16 use_tucker=True",
    "DoRA": "networks.lora dora_wd=True",
    "LoHa": "networks.loha",
    "LoKr, factor 8": "networks.lokr factor=8",
    "LoKr, factor 8, whole blocks": "networks.lokr factor=8 full_matrix=True",
    "OFT, 16 blocks, transformers": "networks.oft enable_all_linear=True",
}


class Bench:
    """The U-Net, its inputs, and the networks on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        spec, dtype = SIZES[arguments.size].unet, DTYPES[arguments.dtype]
        self.unet: Any = quick_module(build.empty_unet(spec), dtype).requires_grad_(False)
        keep_less_for_backward(self.unet)
        side, generator = arguments.pixels // 8, torch.Generator().manual_seed(0)
        self.latents_BCHW = torch.randn(arguments.batch, 4, side, side, generator=generator).to(dtype)
        self.context_BTD = torch.randn(arguments.batch, 77, spec.context_width, generator=generator).to(dtype)
        self.rank = arguments.rank

    def network(self, line: str) -> Any:
        """A network of `ROWS`, ready to learn, not attached."""
        module, *pairs = line.split()
        torch.manual_seed(0)
        create = load_network_module(module).create_network
        return create(1.0, self.rank, float(self.rank), None, None, self.unet, **split_pairs(pairs, "network_args"))

    def loss(self, network: Any) -> Tensor:
        """A forward pass through the U-Net."""
        network.on_step_start()
        steps_B = torch.full((self.latents_BCHW.shape[0],), 500)
        return self.unet(self.latents_BCHW, steps_B, self.context_BTD).sample.float().square().mean()

    def attached(self, network: nn.Module, action: Callable[[], Any]) -> Any:
        """Do it while the network is attached and learns."""
        plugin: Any = network
        plugin.apply_to(None, self.unet)
        plugin.prepare_optimizer_params(None, 1e-4, 1e-4)
        plugin.on_epoch_start(None, self.unet)
        try:
            return action()
        finally:
            network.zero_grad()
            plugin.detach()

    def kept(self, network: Any) -> tuple[int, int]:
        """(parameters that learn, bytes that autograd keeps of a forward pass)."""

        def measure() -> tuple[int, int]:
            with SavedBytes([*self.unet.parameters(), *network.parameters()]) as saved:
                loss = self.loss(network)
            total = saved.total  # while the graph lives
            del loss
            return sum(parameter.numel() for parameter in network.get_trainable_params()), total

        return self.attached(network, measure)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of each type of network on the U-Net of SD 1.x.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="toy: 3M parameters; full: SD 1.x")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="type of the frozen weights")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step")
    parser.add_argument("--rank", type=int, default=16, help="rank; OFT: number of blocks")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each network")
    parser.add_argument("--rows", default="", help="only rows whose name contains this, and LoRA")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments)
    networks = {name: bench.network(line) for name, line in ROWS.items() if name == "LoRA" or arguments.rows in name}
    figures = {name: bench.kept(network) for name, network in networks.items()}

    def turn(network: Any) -> Callable[[], object]:
        return lambda: bench.attached(network, lambda: bench.loss(network).backward())

    timings = alternate({name: turn(network) for name, network in networks.items()}, arguments.rounds)
    print(f"SD 1.x, {arguments.size}, {arguments.dtype}, {arguments.pixels} px, batch {arguments.batch}")
    print(f"{'':<30}{'learns, M':>11}{'kept MB':>10}{'over LoRA':>11}{'time over LoRA':>16}")
    base = figures["LoRA"][1]
    for name, (count, kept) in figures.items():
        time = timings.ratios(name, "LoRA").processor
        print(f"{name:<30}{count / 1e6:>11.2f}{kept / MEGABYTE:>10.1f}{kept / base:>11.3f}{time:>16.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
