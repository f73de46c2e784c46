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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import alternate
from benchmarks.random_models import DTYPES, SIZES, TOY, random_module
from library.data.cache import FileState, LatentStore, target_of
from library.data.dataset import TrainImages
from library.data.records import (
    BucketRules,
    DatasetKind,
    DatasetSpec,
    Fit,
    ImageRecord,
    ResolvedDataset,
    StepPlan,
    SubsetSpec,
)
from library.diffusion.schedule import make_schedule
from library.families.base import ModelParts, ModelSource
from library.families.sd import SdFamily
from library.interrupt import StopRequest
from library.models import build
from library.options import LoopOptions
from library.options.script import parse
from library.options.scripts import TRAIN_NETWORK
from library.options.settings import Settings
from library.training.clock import Clock
from library.training.guard import FiniteGuard
from library.training.kinds.adapter import AdapterTraining
from library.training.loop import Job, train_step
from library.training.machine import open_machine
from library.training.prepare import Models, make_step
from library.training.setup import make_arrangement, make_optimizer, make_update
from library.training.trackers import Trackers

IMAGES = 8
MANY_STEPS = 100_000


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The options that a user would give for this training."""
    mixed = "no" if arguments.dtype == "fp32" else arguments.dtype
    line = (
        "--pretrained_model_name_or_path none --train_data_dir none --output_dir none --network_module networks.lora "
        f"--network_dim {arguments.rank} --network_alpha {arguments.rank} --network_train_unet_only --cache_latents "
        f"--learning_rate 1e-4 --optimizer_type AdamW --seed 1 --mixed_precision {mixed} "
        f"--max_train_steps {MANY_STEPS} --train_batch_size {arguments.batch} --resolution {arguments.pixels}"
    )
    return parse(TRAIN_NETWORK, line.split())


def cached_images(arguments: argparse.Namespace) -> TrainImages:
    """A data set whose latents are in memory, all with one caption."""
    size = (arguments.pixels, arguments.pixels)
    fit = Fit(size, size, (0.0, 0.0, float(size[0]), float(size[1])), 0.0)
    records = tuple(
        ImageRecord(f"{index}.png", f"{index}.png", size, "a photo of a cat", 1, False, 0)
        for index in range(max(IMAGES, arguments.batch))
    )
    spec = DatasetSpec(DatasetKind.DREAMBOOTH, arguments.batch, BucketRules(size), (SubsetSpec("images"),))
    store = LatentStore("sd", "random")
    generator = torch.Generator().manual_seed(1)
    for record in records:
        latents_CHW = torch.randn(4, arguments.pixels // 8, arguments.pixels // 8, generator=generator)
        store.put(target_of(record, fit), FileState(0, 0), latents_CHW, None)
    return TrainImages((ResolvedDataset(spec, records, (fit,) * len(records)),), store, seed=1)


def our_step(arguments: argparse.Namespace, unet: Any) -> tuple[Callable[[], object], int]:
    """One optimizer step of the trainer per call, built as a run builds it; and the number of parameters that learn."""
    settings = settings_of(arguments)
    machine = open_machine(settings, Trackers(settings, "benchmark"))
    architecture, dtype = SIZES[arguments.size], DTYPES[arguments.dtype]
    encoder = random_module(build.empty_text_encoder(architecture.text_encoders[0]), dtype)
    vae = random_module(build.empty_vae(TOY.vae), dtype)  # with cached latents nothing calls it
    parts = ModelParts((encoder,), unet, vae, architecture, "epsilon", ModelSource("none", Path("none")))
    family = SdFamily()
    trainable = AdapterTraining(settings, family, parts)
    models = Models(family, parts, trainable, cached_images(arguments), text_learns=False)
    arrangement, _ = make_arrangement(settings, models, machine, seed=1)
    clock = Clock(MANY_STEPS, 1)
    optimizer, facts = make_optimizer(settings, models, machine, clock)
    step = make_step(settings, models, machine, make_schedule())
    update = make_update(settings, models, machine, step, optimizer, facts)
    guard = FiniteGuard(settings[LoopOptions].on_nan, has_scaler=False)
    stop = StopRequest("stopping")
    job = Job(clock, update.step, trainable, update, guard, arrangement.plan, arrangement.batches, (), stop, seed=1)
    trainable.on_epoch_start()

    def turns() -> Iterator[object]:
        for epoch in range(1, MANY_STEPS):
            plan: Sequence[StepPlan] = job.plan(epoch)
            batches = job.batches(plan, clock)
            for step_plan in plan:
                yield train_step(job, step_plan, batches)
                clock.advance()

    run = turns()
    return lambda: next(run), sum(p.numel() for p in trainable.trained_parameters())


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
    target = "at most 1.05" if arguments.size == "full" else "at most 1.25"
    print(alternate({"bare": bare, "ours": ours}, rounds, warm_up=2).lines("bare", target))
    return 0


def _print_profile(step: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    sys.exit(main())
