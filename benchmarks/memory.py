"""What a training step needs in memory, option by option, on a full-size model with random weights.

Each row is a process of its own that builds the run as a script does and makes a few optimizer steps on cached latents.
It reports the weights that are held, the bytes that autograd keeps from the forward to the backward pass (the same on
every device), the peak of the process above its imports (on the CPU), and the time of a step. The VAE is a toy: with
cached latents nothing calls it, and a run moves it away.

A further row is a line in `ROWS`: a name and the command line of its settings.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import MEGABYTE, PeakMemory, SavedBytes, saved_by_operation, timed
from benchmarks.random_models import DTYPES, SDXL_SIZES, TOY, quick_module, random_module
from benchmarks.steps import MANY_STEPS, Forward, cached_images, optimizer_steps
from library.data.records import Batch
from library.families.base import ModelParts, ModelSource, TextCondition, TextSettings, TokenBatch
from library.families.sdxl import SdxlFamily
from library.models import build
from library.models.spec import ArchitectureSpec
from library.options import PrecisionOptions
from library.options.script import parse
from library.options.scripts import SDXL_TRAIN, SDXL_TRAIN_LLLITE, SDXL_TRAIN_NETWORK, TRAIN_CONTROLNET
from library.options.settings import Settings
from library.training.machine import Machine, open_machine
from library.training.prepare import Models, attach
from library.training.script import Script
from library.training.trackers import Trackers

LORA = Script(SDXL_TRAIN_NETWORK, kind="library.training.kinds.adapter:AdapterTraining", tracker_name="benchmark")
FULL = Script(SDXL_TRAIN, kind="library.training.kinds.full:FullTraining", tracker_name="benchmark")
LLLITE = Script(SDXL_TRAIN_LLLITE, kind="library.training.kinds.control:LLLiteTraining", tracker_name="benchmark")
CONTROL = Script(TRAIN_CONTROLNET, kind="library.training.kinds.control:ControlNetTraining", tracker_name="benchmark")
GUIDED = (LLLITE, CONTROL)  # these learn from pairs of pictures
LORA_LINE = "--network_module networks.lora --network_train_unet_only --optimizer_type AdamW"
FULL_LINE = (
    "--optimizer_type AdaFactor --optimizer_args relative_step=False scale_parameter=False --max_grad_norm 0"
    " --gradient_checkpointing"
)
CONTROL_LINE = (  # with AdamW its moments alone would take 10 GB
    "--sdxl --conditioning_data_dir unread --optimizer_type AdaFactor --optimizer_args relative_step=False"
    " scale_parameter=False --max_grad_norm 0"
)
LLLITE_LINE = "--conditioning_data_dir unread --optimizer_type AdamW"
COMMON_LINE = "--pretrained_model_name_or_path unread --train_data_dir unread --output_dir out --cache_latents --seed 1"


@dataclass(frozen=True)
class Row:
    """A kind of run: its script, what its command line has beside size and precision, and what it keeps in memory.

    ``keeps_text_encoders``: False for runs with cached text. ``by_torch``: layers as torch and diffusers have them, for
    comparison.
    """

    script: Script
    line: str
    keeps_text_encoders: bool = True
    by_torch: bool = False

    def settings(self, arguments: argparse.Namespace) -> Settings:
        """The options of this row, as a user would give them."""
        mixed = "no" if arguments.dtype == "fp32" else arguments.dtype
        size = f"--resolution {arguments.pixels} --train_batch_size {arguments.batch} --max_train_steps {MANY_STEPS}"
        rank = f"--network_dim {arguments.rank} --network_alpha {arguments.rank}" if self.script is LORA else ""
        full = "--full_bf16" if self.script is FULL and mixed == "bf16" else ""
        line = f"{COMMON_LINE} {self.line} {size} {rank} {full} --mixed_precision {mixed}"
        return parse(self.script.options, line.split())


ROWS = {
    "LoRA, torch's own layers": Row(LORA, LORA_LINE, by_torch=True),
    "LoRA": Row(LORA, LORA_LINE),
    "LoRA, cached text": Row(LORA, LORA_LINE, keeps_text_encoders=False),
    "LoRA, checkpointing, torch's own layers": Row(LORA, f"{LORA_LINE} --gradient_checkpointing", by_torch=True),
    "LoRA, checkpointing": Row(LORA, f"{LORA_LINE} --gradient_checkpointing"),
    "LoRA, checkpointing, cached text": Row(LORA, f"{LORA_LINE} --gradient_checkpointing", keeps_text_encoders=False),
    "LLLite, cached text": Row(LLLITE, LLLITE_LINE, keeps_text_encoders=False),
    "LLLite, checkpointing, cached text": Row(
        LLLITE, f"{LLLITE_LINE} --gradient_checkpointing", keeps_text_encoders=False
    ),
    "ControlNet, cached text": Row(CONTROL, CONTROL_LINE, keeps_text_encoders=False),
    "ControlNet, checkpointing, cached text": Row(
        CONTROL, f"{CONTROL_LINE} --gradient_checkpointing", keeps_text_encoders=False
    ),
    "U-Net, checkpointing, cached text": Row(FULL, FULL_LINE, keeps_text_encoders=False),
    "U-Net, the same, fused backward": Row(FULL, f"{FULL_LINE} --fused_backward_pass", keeps_text_encoders=False),
}


class _CachedText(SdxlFamily):
    """SDXL whose captions were encoded before."""

    def __init__(self, condition: TextCondition) -> None:
        super().__init__()
        self._condition = condition

    def encode(self, text_encoders: Sequence[nn.Module], tokens: TokenBatch, settings: TextSettings) -> TextCondition:
        return self._condition


def load(row: Row, spec: ArchitectureSpec, dtype: torch.dtype) -> tuple[SdxlFamily, ModelParts]:
    """The models of a row, with random weights."""
    unet = quick_module(build.empty_unet(spec.unet), dtype)
    texts = spec.text_encoders if row.keeps_text_encoders else ()
    encoders = tuple(quick_module(build.empty_text_encoder(text), dtype) for text in texts)
    vae = random_module(build.empty_vae(TOY.vae), dtype)
    held = replace(spec, text_encoders=texts)
    parts = ModelParts(encoders, unet, vae, held, "epsilon", ModelSource("none", Path("none")))
    if row.keeps_text_encoders:
        return SdxlFamily(), parts
    pooled_width = spec.text_encoders[1].projection_width or 0
    condition = TextCondition(torch.randn(1, 77, spec.unet.context_width), torch.randn(1, pooled_width))
    return _CachedText(condition), parts


def run(row: Row, arguments: argparse.Namespace, machine: Machine, spec: ArchitectureSpec) -> dict[str, Any]:
    """A few steps: bytes of the weights, bytes kept for the backward pass and by which operations, and seconds of the
    last step.
    """
    settings = row.settings(arguments)
    family, parts = load(row, spec, DTYPES[arguments.dtype])
    skipped: AbstractContextManager[object] = mock.patch("library.training.prepare.keep_less_for_backward")
    with skipped if row.by_torch else nullcontext():
        trainable, learns = attach(row.script, settings, family, parts, machine, seed=1)
    models = Models(
        family, parts, trainable, cached_images(family.latent_space, arguments.pixels, arguments.batch), learns
    )
    frozen = [tensor for module in parts.modules() for tensor in module.state_dict().values()]
    kept: list[int] = []
    operations: dict[str, int] = {}

    def around(forward: Forward) -> Forward:
        def watched(batch: Batch, count: int) -> Any:
            if row.script in GUIDED:
                guides_BCHW = torch.zeros(len(batch.keys), 3, arguments.pixels, arguments.pixels)
                batch = replace(batch, conditioning_images_BCHW=guides_BCHW)
            if kept:
                return forward(batch, count)
            with SavedBytes([*frozen, *trainable.trained_parameters()]) as saved:
                result = forward(batch, count)
            kept.append(saved.total)
            if not settings[PrecisionOptions].gradient_checkpointing:
                operations.update(saved_by_operation(result.loss, [*frozen, *trainable.trained_parameters()]))
            return result

        return watched

    step = optimizer_steps(settings, models, machine, around)
    times = [timed(step).wall for _ in range(arguments.steps)]
    weights = sum(tensor.nbytes for tensor in frozen)
    return {"weights": weights, "kept": kept[0], "seconds": times[-1], "operations": operations}


def measure(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row's figures, in this process; the peak is above what imports and a toy run take."""
    torch.set_num_threads(arguments.threads)
    settings = row.settings(arguments)
    machine = open_machine(settings, Trackers(settings, "benchmark"))
    small = argparse.Namespace(**{**vars(arguments), "pixels": 64, "steps": 1})
    run(row, small, machine, SDXL_SIZES["toy"])
    gc.collect()
    with PeakMemory() as memory:
        figures = run(row, arguments, machine, SDXL_SIZES[arguments.size])
    return {**figures, "peak": memory.above_start}


def _in_own_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--inside", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3600)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Memory of an SDXL training step, option by option.")
    parser.add_argument("--size", choices=sorted(SDXL_SIZES), default="toy", help="toy: 3M parameters; full: SDXL")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="type of the frozen weights")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    parser.add_argument("--steps", type=int, default=2, help="steps a row; the time is that of the last one")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch: more than one disturb a busy machine")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--by_operation", action="store_true", help="print which operations keep what")
    parser.add_argument("--inside", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure(ROWS[arguments.inside], arguments)))
        return 0
    print(f"SDXL, {arguments.size}, {arguments.dtype}, {arguments.pixels} px, batch {arguments.batch}")
    print(f"{'':<42}{'weights MB':>12}{'kept MB':>12}{'peak MB':>12}{'s a step':>10}")
    started = time.perf_counter()
    for name in (name for name in ROWS if arguments.rows in name):
        found = _in_own_process(name)
        weights, kept, peak = (f"{found[key] / MEGABYTE:>12,.1f}" for key in ("weights", "kept", "peak"))
        print(f"{name:<42}{weights}{kept}{peak}{found['seconds']:>10.2f}", flush=True)
        for operation, size in found["operations"].items() if arguments.by_operation else ():
            print(f"    {size / MEGABYTE:10.3f} MB  {operation}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
