"""The cost of the trainer around the model: our whole optimizer step over a bare one written by hand.

Both train a LoRA of the same rank on the same U-Net (random weights, shared) and the same latents, with the same fused
AdamW. The bare step has its inputs ready and consists of forward, loss, backward and update; it neither draws noise
nor clips, checks or schedules anything.

B samples, C latent channels, H W latent height and width, T tokens, D width.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Budget, alternate
from benchmarks.random_models import DTYPES, SIZES, TOY, random_module
from benchmarks.steps import MANY_STEPS, cached_images, optimizer_steps
from library.families.base import ModelParts, ModelSource
from library.families.sd import SdFamily
from library.models import build
from library.options.script import parse
from library.options.scripts import TRAIN_NETWORK
from library.options.settings import Settings
from library.training.machine import open_machine
from library.training.prepare import Models, attach
from library.training.script import Script
from library.training.trackers import Trackers

SCRIPT = Script(TRAIN_NETWORK, kind="library.training.kinds.adapter:AdapterTraining", tracker_name="benchmark")
BUDGETS = {size: Budget("training step over a bare one", limit) for size, limit in (("full", 1.05), ("toy", 1.25))}


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The options that a user would give for this training."""
    mixed = "no" if arguments.dtype == "fp32" else arguments.dtype
    line = (
        "--pretrained_model_name_or_path unread --train_data_dir unread --output_dir out "
        f"--network_module networks.lora --network_dim {arguments.rank} --network_alpha {arguments.rank} "
        "--network_train_unet_only --cache_latents "
        f"--learning_rate 1e-4 --optimizer_type AdamW --seed 1 --mixed_precision {mixed} "
        f"--max_train_steps {MANY_STEPS} --train_batch_size {arguments.batch} --resolution {arguments.pixels}"
    )
    return parse(TRAIN_NETWORK, line.split())


def our_step(arguments: argparse.Namespace, unet: Any) -> tuple[Callable[[], object], int]:
    """One optimizer step of the trainer per call, built as a run builds it; and the number of parameters that learn."""
    settings = settings_of(arguments)
    machine = open_machine(settings, Trackers(settings, "benchmark"))
    architecture, dtype = SIZES[arguments.size], DTYPES[arguments.dtype]
    encoder = random_module(build.empty_text_encoder(architecture.text_encoders[0]), dtype)
    vae = random_module(build.empty_vae(TOY.vae), dtype)  # with cached latents nothing calls it
    parts = ModelParts((encoder,), unet, vae, architecture, "epsilon", ModelSource("none", Path("none")))
    family = SdFamily()
    trainable, learns = attach(SCRIPT, settings, family, parts, machine, seed=1)
    images = cached_images(family.latent_space, arguments.pixels, arguments.batch)
    models = Models(family, parts, trainable, images, learns)
    return optimizer_steps(settings, models, machine), sum(p.numel() for p in trainable.trained_parameters())


def bare_step(arguments: argparse.Namespace, unet: Any) -> tuple[Callable[[], object], int]:
    """Forward, loss, backward and update with LoRA as functions, on inputs that are ready."""
    dtype = DTYPES[arguments.dtype]
    parameters: list[nn.Parameter] = []
    for name, layer in unet.named_modules():
        if ".attentions." in name and (isinstance(layer, nn.Linear) or getattr(layer, "kernel_size", None) == (1, 1)):
            parameters += _hand_made_lora(layer, arguments.rank)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    width, side = unet.config.cross_attention_dim, arguments.pixels // 8
    generator = torch.Generator().manual_seed(2)
    noisy_BCHW, noise_BCHW = torch.randn(2, arguments.batch, 4, side, side, generator=generator)
    text_BTD = torch.randn(arguments.batch, 77, width, generator=generator).to(dtype)
    timesteps_B = torch.randint(0, 1000, (arguments.batch,), generator=generator)

    def step() -> None:
        output_BCHW = unet(noisy_BCHW.to(dtype), timesteps_B, text_BTD, return_dict=False)[0]
        F.mse_loss(output_BCHW.float(), noise_BCHW).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in parameters)


def _hand_made_lora(layer: nn.Module, rank: int) -> list[nn.Parameter]:
    inner: Callable[[Tensor], Tensor] = layer.forward
    weight: Any = layer.weight
    down = nn.Parameter(torch.randn(rank, *weight.shape[1:]) / rank)
    up = nn.Parameter(torch.zeros(weight.shape[0], rank, *weight.shape[2:]))
    product = F.conv2d if weight.dim() == 4 else F.linear

    def forward(x: Tensor) -> Tensor:
        return inner(x) + product(product(x, down.to(x.dtype)), up.to(x.dtype))

    layer.forward = forward
    return [down, up]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time of our training step over that of a bare one.")
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="toy: 2M parameters; full: SD 1.5")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the frozen weights")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA")
    parser.add_argument("--rounds", type=int, default=0, help="measured pairs of steps (0: 5 for full, 60 for toy)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch: more than one disturb a busy machine")
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours_unet = random_module(build.empty_unet(SIZES[arguments.size].unet), DTYPES[arguments.dtype])
    shared = {id(tensor): tensor for tensor in (*ours_unet.parameters(), *ours_unet.buffers())}
    ours, our_count = our_step(arguments, copy.deepcopy(ours_unet, shared))
    bare, bare_count = bare_step(arguments, copy.deepcopy(ours_unet, shared))
    if our_count != bare_count:
        raise SystemExit(f"not comparable: {our_count:,} parameters learn here, {bare_count:,} there")
    rounds = arguments.rounds or (5 if arguments.size == "full" else 60)
    print(f"{arguments.size}, {arguments.dtype}, {arguments.pixels} px, {our_count:,} parameters learn", flush=True)
    if arguments.profile:
        _print_profile(ours)
    timings = alternate({"bare": bare, "ours": ours}, rounds, warm_up=2)
    print(timings.lines("bare"))
    case = f"{arguments.size}, {arguments.dtype}, {arguments.pixels} px, batch {arguments.batch}"
    print(BUDGETS[arguments.size].line(timings.ratios("ours", "bare").processor, case))
    return 0


def _print_profile(step: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    sys.exit(main())
