"""The machine of a run: accelerate's Accelerator, the device and the number types, decided once."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
    gather_object,
    reduce,
)
from torch import nn

from library.device import check_precision, empty_cache, vae_dtype, weight_dtype
from library.options import LoopOptions, PrecisionOptions
from library.options.settings import Settings
from library.training.trackers import Trackers

logger = logging.getLogger(__name__)
DEFAULT_TIMEOUT_MINUTES = 240  # caching latents of a large data set keeps other processes waiting


@dataclass(frozen=True)
class Machine:
    """``weight_dtype`` is what frozen weights are held in and computed with; ``trained_dtype`` that of what learns."""

    accelerator: Accelerator
    device: torch.device
    weight_dtype: torch.dtype
    trained_dtype: torch.dtype
    vae_dtype: torch.dtype

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def wrap(self, step: nn.Module, optimizer: Any, *, may_skip_parameters: bool) -> tuple[nn.Module, Any]:
        """Step and optimizer as accelerate runs them on this number of processes."""
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = may_skip_parameters
        return self.accelerator.prepare(step, optimizer)

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def agree(self, value: Any) -> Any:
        """The main process's value, in all processes."""
        return broadcast_object_list([value])[0]

    def any(self, value: bool) -> bool:
        """True in all processes if it is true in one of them."""
        if self.processes == 1:
            return value
        return bool(reduce(torch.tensor(int(value), device=self.device), "sum"))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in their order, in all processes."""
        return gather_object([value])

    def empty_cache(self) -> None:
        """Give memory that is not in use back to the device."""
        empty_cache(self.device)


def open_machine(settings: Settings, trackers: Trackers) -> Machine:
    """Start accelerate with the run's options. Raises UserError for what this machine cannot do."""
    precision, loop = settings[PrecisionOptions], settings[LoopOptions]
    handlers: list[KwargsHandler] = [
        AutocastKwargs(enabled=False),  # the step decides: networks that cast by themselves need none
        InitProcessGroupKwargs(timeout=timedelta(minutes=loop.ddp_timeout or DEFAULT_TIMEOUT_MINUTES)),
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=loop.ddp_gradient_as_bucket_view,
            static_graph=loop.ddp_static_graph,
        ),
    ]
    if precision.deterministic:  # without it CUDA's products of matrices are refused there
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the step divides; no variable may, too
        mixed_precision=precision.mixed_precision,
        kwargs_handlers=handlers,
        log_with=list(trackers.log_with) or None,
        project_dir=trackers.log_dir,
    )
    _warn_of_lost_processes(accelerator.num_processes)
    check_precision(precision, accelerator.device)
    if precision.full_fp16:
        _allow_fp16_gradients(accelerator)
    torch.use_deterministic_algorithms(precision.deterministic)
    dtype = weight_dtype(precision.mixed_precision)
    full = precision.full_fp16 or precision.full_bf16
    return Machine(
        accelerator=accelerator,
        device=accelerator.device,
        weight_dtype=dtype,
        trained_dtype=dtype if full else torch.float32,
        vae_dtype=vae_dtype(precision),
    )


class _HalfGradientScaler(torch.amp.GradScaler):
    """A gradient scaler that also unscales fp16 gradients, as ``--full_fp16`` has them."""

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def _allow_fp16_gradients(accelerator: Accelerator) -> None:
    if accelerator.scaler is not None:
        accelerator.scaler = _HalfGradientScaler(accelerator.device.type)


def process_count() -> int:
    """Processes of this run as the launcher set them up; usable before accelerate is."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def _warn_of_lost_processes(processes: int) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process and says nothing: say it."""
    if processes > 1 or "WORLD_SIZE" in os.environ:
        return
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return
    if not any("accelerate" in word for word in words):
        return
    for word, value in zip(words, [*words[1:], ""], strict=True):
        asked = (
            word.partition("=")[2]
            if word.startswith("--num_processes=")
            else value
            if word == "--num_processes"
            else ""
        )
        if asked.isdigit() and int(asked) > 1:
            logger.warning(
                "accelerate was asked for %s processes but started one; on the CPU use "
                "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes %s ...",
                asked,
                asked,
            )
