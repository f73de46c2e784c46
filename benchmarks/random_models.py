"""Models with random weights, in the shapes of Stable Diffusion 1.5 and of a toy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from library.models import build
from library.models.spec import SD1, ArchitectureSpec, TextEncoderSpec, UNetSpec, VaeSpec

TOY = ArchitectureSpec(
    "sd1",
    UNetSpec(widths=(32, 64, 64, 64), context_width=32, sample_size=8),
    (TextEncoderSpec(width=32, mlp_width=64, heads=1, layers=2),),
    VaeSpec((32, 64, 64, 64), layers_per_level=1),
)
SIZES = {"full": SD1, "toy": TOY}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def random_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(canonical key, tensor) of a module, one by one, float32, of a size that keeps activations finite."""
    generator = torch.Generator().manual_seed(0)
    for key, shape in build.shapes_of(module).items():
        if len(shape) > 1:
            fan_in = torch.Size(shape[1:]).numel()
            yield key, torch.randn(shape, generator=generator) / fan_in**0.5
        else:
            yield key, torch.full(shape, 1.0 if "norm" in key and key.endswith("weight") else 0.0)


def random_module(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """An empty module, filled; frozen and in eval mode."""
    return build.fill(module, random_tensors(module), dtype, "cpu")
