"""The time of drawing a picture over that of the bare U-Net calls that it takes, with guidance (batches of two).

Both sides share one U-Net with random weights and make the same number of calls; ours also samples, guides and takes
its text from the cache of the engine. The VAE is left out. ``--networks N`` merges N LoRA networks into ours first,
which must cost nothing per step.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Budget, alternate
from benchmarks.random_models import DTYPES, SIZES, TOY, random_module
from library.diffusion.schedule import make_schedule
from library.families.base import ModelParts, ModelSource
from library.families.sd import SdFamily
from library.generation.engine import Engine, EngineSettings
from library.generation.jobs import Job, Shared
from library.models import build
from networks.lora import create_network

BUDGETS = {size: Budget("drawing over the bare U-Net calls", limit) for size, limit in (("full", 1.03), ("toy", 1.25))}


def our_drawing(arguments: argparse.Namespace, unet: Any) -> Callable[[], object]:
    """Draws the latents of one picture, as a run of gen_img.py does."""
    architecture, dtype = SIZES[arguments.size], DTYPES[arguments.dtype]
    encoder = random_module(build.empty_text_encoder(architecture.text_encoders[0]), dtype)
    vae = random_module(build.empty_vae(TOY.vae), dtype)
    parts = ModelParts((encoder,), unet, vae, architecture, "epsilon", ModelSource("none", Path("none")))
    settings = EngineSettings(make_schedule(), torch.device("cpu"), dtype)
    engine = Engine(SdFamily(), parts, settings)
    side = arguments.pixels
    shared = Shared(side, side, arguments.steps, arguments.sampler, 7.5)
    job = Job(0, "", "a photo of a cat", "blurry", 1, shared)
    return lambda: engine.draw_latents([job])


def merge_networks(unet: nn.Module, count: int, rank: int) -> None:
    """Merge networks with small random weights into the U-Net."""
    for _ in range(count):
        network = create_network(1.0, rank, rank, None, [], unet)
        for parameter in (parameter for adapter in network.adapters for parameter in adapter.parameters()):
            nn.init.normal_(parameter, std=1e-3)
        network.merge_to([], unet, None, torch.float32, torch.device("cpu"))


def bare_calls(arguments: argparse.Namespace, unet: Any) -> Callable[[], object]:
    """The same number of calls of the U-Net on inputs that are ready."""
    dtype, side = DTYPES[arguments.dtype], arguments.pixels // 8
    latents_BCHW = torch.randn(2, 4, side, side).to(dtype)
    text_BTD = torch.randn(2, 77, unet.config.cross_attention_dim).to(dtype)
    timesteps = torch.linspace(999, 1, arguments.steps)

    @torch.no_grad()
    def calls() -> None:
        for timestep in timesteps:
            unet(latents_BCHW, timestep.expand(2), text_BTD, return_dict=False)

    return calls


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time of drawing over that of the bare U-Net calls.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="toy: 2M parameters; full: SD 1.5")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights")
    parser.add_argument("--pixels", type=int, default=0, help="side of the picture (0: 256 for full, 64 for toy)")
    parser.add_argument("--steps", type=int, default=0, help="steps of a picture (0: 3 for full, 10 for toy)")
    parser.add_argument("--sampler", default="euler", help="sampler; one call a step is assumed")
    parser.add_argument("--networks", type=int, default=0, help="LoRA networks merged before")
    parser.add_argument("--rank", type=int, default=32, help="their rank")
    parser.add_argument("--rounds", type=int, default=0, help="measured pairs (0: 3 for full, 10 for toy)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch: more than one disturb a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.pixels = arguments.pixels or (256 if arguments.size == "full" else 64)
    arguments.steps = arguments.steps or (3 if arguments.size == "full" else 10)
    rounds = arguments.rounds or (3 if arguments.size == "full" else 10)
    unet = random_module(build.empty_unet(SIZES[arguments.size].unet), DTYPES[arguments.dtype])
    # merging must leave plain layers: the bare calls are those of a U-Net that never had a network
    bare = bare_calls(arguments, copy.deepcopy(unet) if arguments.networks else unet)
    merge_networks(unet, arguments.networks, arguments.rank)
    turns = {"bare": bare, "ours": our_drawing(arguments, unet)}
    print(f"{arguments.size}, {arguments.dtype}, {arguments.pixels} px, {arguments.steps} steps")
    timings = alternate(turns, rounds, warm_up=2)
    print(timings.lines("bare"))
    case = f"{arguments.size}, {arguments.dtype}, {arguments.pixels} px, {arguments.networks} networks merged"
    print(BUDGETS[arguments.size].line(timings.ratios("ours", "bare").processor, case))
    return 0


if __name__ == "__main__":
    sys.exit(main())
