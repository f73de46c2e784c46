"""Models with random weights, in the shapes of Stable Diffusion 1.5, of SDXL and of toys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.checkpoint.io import LazyTensor, save_safetensors
from library.models import build
from library.models.save import whole_state
from library.models.spec import (
    SD1,
    SDXL,
    SDXL_LATENT_SCALE,
    ArchitectureSpec,
    TextEncoderSpec,
    UNetSpec,
    VaeSpec,
)

TOY = ArchitectureSpec(
    "sd1",
    UNetSpec(widths=(32, 64, 64, 64), context_width=32, sample_size=8),
    (TextEncoderSpec(width=32, mlp_width=64, heads=1, layers=2),),
    VaeSpec((32, 64, 64, 64), layers_per_level=1),
)
TOY_SDXL = ArchitectureSpec(
    "sdxl",
    UNetSpec(
        widths=(32, 64, 128),
        depths=(0, 1, 2),
        heads=(1, 1, 2),
        mid_depth=2,
        context_width=96,
        linear_projection=True,
        vector_width=48 + 6 * 32,
        size_width=32,
        sample_size=8,
    ),
    (
        TextEncoderSpec(width=32, mlp_width=64, heads=1, layers=2),
        TextEncoderSpec(64, 128, 1, 3, "gelu", projection_width=48, layout="openclip"),
    ),
    VaeSpec((32, 64, 64, 64), layers_per_level=1, scaling_factor=SDXL_LATENT_SCALE),
)
SIZES = {"full": SD1, "toy": TOY}
SDXL_SIZES = {"full": SDXL, "toy": TOY_SDXL}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


_BLOCK = 1 << 20
ModuleT = TypeVar("ModuleT", bound=nn.Module)


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


def quick_module(module: ModuleT, dtype: torch.dtype = torch.float32) -> ModuleT:
    """An empty module, filled by repeating one block of random numbers: for sizes where drawing takes minutes.

    Nothing but the module takes memory meanwhile. Frozen and in eval mode.
    """
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)
    return build.fill(module, _repeated(build.shapes_of(module), block), dtype, "cpu")


def _repeated(shapes: dict[str, tuple[int, ...]], block: Tensor) -> Iterator[tuple[str, Tensor]]:
    for key, shape in shapes.items():
        if len(shape) > 1:
            yield key, _tile(block, shape) / torch.Size(shape[1:]).numel() ** 0.5
        else:
            yield key, torch.full(shape, 1.0 if "norm" in key and key.endswith("weight") else 0.0)


def _tile(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return (block if count <= _BLOCK else block.repeat(-(-count // _BLOCK)))[:count].view(shape)


def write_quick_checkpoint(path: Path, spec: ArchitectureSpec, dtype: torch.dtype) -> None:
    """A Stability file with random numbers, made tensor by tensor: one tensor is in memory at a time."""
    modules: dict[str, nn.Module] = {
        **{
            name: build.empty_text_encoder(text) for name, text in zip(spec.text_parts, spec.text_encoders, strict=True)
        },
        "unet": build.empty_unet(spec.unet),
        "vae": build.empty_vae(spec.vae),
    }
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors, notes = whole_state(spec, modules)
    lazy = {key: LazyTensor(dtype, one.shape, lambda one=one: _tile(block, one.shape)) for key, one in tensors.items()}
    save_safetensors(path, lazy, notes)
