"""Which device, which number format, and what this machine cannot do, said in one line each.

torch is imported inside the functions, so that options can be checked without it.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from library.log import UserError, first_line

if TYPE_CHECKING:
    import torch

    from library.options import PrecisionOptions

AttentionKind = Literal["sdpa", "xformers", "sliced"]


def choose_device() -> torch.device:
    """cuda (also ROCm), xpu, mps or cpu, in this order; the process's own one where a launcher started several.

    ACCELERATE_USE_CPU (any true word) asks for the CPU.
    """
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on"):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0") or 0)
    if torch.cuda.is_available():
        return torch.device("cuda", index)
    if torch.xpu.is_available():
        return torch.device("xpu", index)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_named(name: str) -> torch.device:
    """The device that ``--device`` names. Raises UserError for one that is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: cannot be used here: {first_line(error)}") from error
    return device


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """The type of frozen weights and of the computation."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """The type in which tensors are saved; None: as they are."""
    import torch

    names = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return None if save_precision is None else names[save_precision]


def vae_dtype(options: PrecisionOptions) -> torch.dtype:
    """The VAE's type: float32 with ``no_half_vae``."""
    return weight_dtype("no" if options.no_half_vae else options.mixed_precision)


def check_precision(options: PrecisionOptions, device: torch.device) -> None:
    """Raise one UserError with all that the options ask for and this device cannot do, one line each.

    What does not fit together on any device is refused with the command line (`library.options.checks`).
    """
    import torch

    problems: list[str] = []
    mixed = options.mixed_precision
    if options.fp8_base and device.type == "mps":
        problems.append("--fp8_base: Apple devices have no float8 numbers; leave it out")
    if mixed == "fp16" and device.type == "cpu":
        problems.append("--mixed_precision fp16 does not work on a CPU; use bf16 or no")
    if mixed == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        problems.append("--mixed_precision bf16: this graphics card cannot do it; use fp16")
    if options.xformers and not options.mem_eff_attn:
        reason = xformers_problem(device)
        if reason:
            problems.append(f"--xformers: {reason}; leave it out, torch's own attention is used then")
    if problems:
        raise UserError.of(problems)


def attention_kind(options: PrecisionOptions) -> AttentionKind:
    """mem_eff_attn wins over xformers, xformers over sdpa; sdpa is also the default."""
    return "sliced" if options.mem_eff_attn else "xformers" if options.xformers else "sdpa"


def xformers_problem(device: torch.device) -> str | None:
    """Why xformers cannot be used here, or None. Being installed is not enough."""
    if importlib.util.find_spec("xformers") is None:
        return "the package xformers is not installed"
    if device.type != "cuda":
        return f"it works on CUDA devices only, not on {device.type}"
    import torch

    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        probe = torch.zeros(1, 8, 1, 40, device=device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except Exception as error:  # a build for another torch fails in many ways
        return f"the installed build does not run here ({first_line(error)})"
    return None


def empty_cache(device: torch.device) -> None:
    """Give memory that is not in use back to the device."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def describe(device: torch.device) -> str:
    """One line for the log: the device's name and memory."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if device.type == "xpu":
        return f"{device}: {torch.xpu.get_device_name(device)}"
    if device.type == "mps":
        return "mps: Apple graphics"
    return f"cpu: {torch.get_num_threads()} threads (training is slow without a graphics card)"


@contextmanager
def one_process_at_a_time(enabled: bool) -> Generator[None]:
    """With ``enabled`` (lowram) local processes run the block in turn, so that their loading peaks do not add up."""
    import torch

    several = enabled and torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several:
        yield
        return
    own = int(os.environ.get("LOCAL_RANK", "0") or 0)
    for rank in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)):
        if rank == own:
            yield
        torch.distributed.barrier()
