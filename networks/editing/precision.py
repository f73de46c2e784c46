"""What the tools for networks share: where they compute, which names they write to, and how what they write keeps its
strength when it is rounded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.device import device_named
from library.log import UserError

logger = logging.getLogger(__name__)

NETWORK_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


def tool_device(name: str | None) -> torch.device:
    """The device of ``--device``; the CPU if none is named. Raises UserError for one that is not there."""
    if not name:
        return torch.device("cpu")
    device = device_named(name)
    if device.type == "mps":
        logger.warning("--device %s: singular values need float64, which it lacks; using the CPU", name)
        return torch.device("cpu")
    return device


def network_path(save_to: str | None) -> Path:
    """The file of ``--save_to``, by whose name networks are written. Raises UserError for a name that cannot be."""
    target = Path(str(save_to))
    if target.suffix.lower() not in NETWORK_SUFFIXES:
        raise UserError(f"--save_to {target}: the name must end in {', '.join(NETWORK_SUFFIXES)}")
    if target.is_dir():
        raise UserError(f"--save_to {target} is a folder; choose another name")
    return target


def require_other(target: Path, sources: Sequence[str | None]) -> None:
    """Raise UserError if what is written would take the place of a file of another kind that it is made of."""
    if target.resolve() in [Path(source).resolve() for source in sources if source]:
        raise UserError(f"--save_to {target} is one of the files that are read; choose another name")


def is_spatial(shape: Sequence[int]) -> bool:
    """True for the weight of a convolution with a kernel larger than 1x1."""
    return len(shape) == 4 and tuple(shape[2:]) != (1, 1)


def scaled_pair(
    up_OR: Tensor, down_RI: Tensor, scale: float, shape: tuple[int, ...], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of a LoRA module with the weight change ``up @ down`` and alpha = scale · rank.

    ``shape``: that of the layer's weight. ``dtype``: what will be saved. Alpha is rounded to it here, and the rest goes
    into the factors, so that rounding alpha does not change the strength.
    """
    rank = down_RI.shape[0]
    alpha = torch.tensor(scale * rank, dtype=dtype or torch.float32).float()
    if not 0 < abs(float(alpha)) < math.inf:  # half precision does not hold it
        alpha = torch.tensor(float(rank))
    root = (rank / abs(float(alpha))) ** 0.5
    sign = -1.0 if alpha < 0 else 1.0
    sides = (1,) * (len(shape) - 2)
    return {
        "alpha": alpha,
        "lora_down.weight": (down_RI * root).reshape(rank, *shape[1:]).to(dtype=dtype).contiguous().cpu(),
        "lora_up.weight": (up_OR * (sign * root)).reshape(shape[0], rank, *sides).to(dtype=dtype).contiguous().cpu(),
    }


def clamped(up_OR: Tensor, down_RI: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors cut to the quantile of the sizes |w| of all their values; 1 leaves them as they are."""
    if quantile >= 1:
        return up_OR, down_RI
    sizes = torch.cat([up_OR.flatten(), down_RI.flatten()]).abs()
    # kthvalue knows no limit of 16 million values, as torch.quantile does
    limit = float(sizes.kthvalue(max(1, round(quantile * sizes.numel()))).values)
    return up_OR.clamp(-limit, limit), down_RI.clamp(-limit, limit)
