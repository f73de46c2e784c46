"""Tiny models in the shapes of SD1, SD2 and SDXL for all tests: every block of the real ones, made in a moment."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import torch
from torch import nn

from library.models import build
from library.models.save import save_folder, save_single_file
from library.models.spec import SDXL_LATENT_SCALE, ArchitectureSpec, PredictionType, TextEncoderSpec, UNetSpec, VaeSpec

WIDTHS = (32, 64, 64, 64)


def toy_spec(family: str = "sd1") -> ArchitectureSpec:
    """The toy's architecture, equal to what is recognised from its file. Pictures of 64 px are its usual size."""
    if family == "sdxl":
        return _toy_sdxl()
    sd2 = family == "sd2"
    unet = UNetSpec(
        widths=WIDTHS,
        heads=(1, 1, 1, 1) if sd2 else (8, 8, 8, 8),
        context_width=64 if sd2 else 32,
        linear_projection=sd2,
        sample_size=8,
    )
    text = (
        TextEncoderSpec(64, 128, 1, 2, "gelu", layout="openclip")
        if sd2
        else TextEncoderSpec(32, 64, 1, 2, "quick_gelu")
    )
    return ArchitectureSpec("sd2" if sd2 else "sd1", unet, (text,), VaeSpec(WIDTHS, layers_per_level=1))


def _toy_sdxl() -> ArchitectureSpec:
    # the projection is no square: its orientation shows
    second = TextEncoderSpec(64, 128, 1, 3, "gelu", projection_width=48, layout="openclip")
    unet = UNetSpec(
        widths=(32, 64, 64),
        depths=(0, 1, 2),
        heads=(1, 1, 1),
        mid_depth=2,
        context_width=96,
        linear_projection=True,
        vector_width=48 + 6 * 32,
        size_width=32,
        sample_size=8,
    )
    vae = VaeSpec(WIDTHS, layers_per_level=1, scaling_factor=SDXL_LATENT_SCALE)
    return ArchitectureSpec("sdxl", unet, (TextEncoderSpec(32, 64, 1, 2, "quick_gelu"), second), vae)


def toy_modules(
    family: str = "sd1",
    seed: int = 0,
    spec: ArchitectureSpec | None = None,
    dtype: torch.dtype = torch.float32,
    drawn_vectors: bool = False,
) -> dict[str, nn.Module]:
    """The parts by name (text_encoder, text_encoder_2, unet, vae), made of ``seed``; outputs have a sensible size.

    ``drawn_vectors``: biases and weights of norms are drawn too, so that one that is lost, doubled or in another's
    place is seen. Else they are 0 and 1: norms that see one value a group, as at 64 px, pass no rounding back then.
    """
    return copy.deepcopy(_made_once(spec or toy_spec(family), seed, dtype, drawn_vectors))


@functools.lru_cache(maxsize=12)
def _made_once(spec: ArchitectureSpec, seed: int, dtype: torch.dtype, drawn_vectors: bool) -> dict[str, nn.Module]:
    """The same, shared by everyone in this process: not to be changed."""
    empty: dict[str, nn.Module] = {
        **{name: build.empty_text_encoder(t) for name, t in zip(spec.text_parts, spec.text_encoders, strict=True)},
        "unet": build.empty_unet(spec.unet),
        "vae": build.empty_vae(spec.vae),
    }
    generator = torch.Generator().manual_seed(seed)
    filled: dict[str, nn.Module] = {}
    for name, module in empty.items():
        shapes = build.shapes_of(module)
        tensors = [(key, _weight(key, shape, generator, drawn_vectors)) for key, shape in sorted(shapes.items())]
        filled[name] = build.fill(module, tensors, dtype, "cpu")
    return filled


def write_toy_checkpoint(
    path: str | Path,
    family: str = "sd1",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    drawn_vectors: bool = False,
) -> Path:
    """A Stability single file (.safetensors) of the toy; the same arguments give the same bytes.

    ``drawn_vectors`` as in `toy_modules`.
    """
    told = tuple((metadata or {}).items())
    Path(path).write_bytes(_file_once(Path(path).suffix, family, seed, dtype, told, drawn_vectors))
    return Path(path)


@functools.lru_cache(maxsize=12)
def _file_once(
    suffix: str,
    family: str,
    seed: int,
    dtype: torch.dtype,
    metadata: tuple[tuple[str, str], ...],
    drawn_vectors: bool,
) -> bytes:
    """The bytes of the checkpoint: 20 MB each, and dozens of test files want the same three."""
    spec = toy_spec(family)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"toy{suffix}"
        save_single_file(file, spec, _made_once(spec, seed, torch.float32, drawn_vectors), dtype, dict(metadata))
        return file.read_bytes()


def write_toy_folder(
    folder: str | Path,
    family: str = "sd1",
    seed: int = 0,
    prediction_type: PredictionType = "epsilon",
    drawn_vectors: bool = False,
) -> Path:
    """A Diffusers folder of the toy, without tokenizer."""
    spec = toy_spec(family)
    save_folder(Path(folder), spec, _made_once(spec, seed, torch.float32, drawn_vectors), prediction_type)
    return Path(folder)


def _weight(key: str, shape: tuple[int, ...], generator: torch.Generator, drawn_vectors: bool) -> torch.Tensor:
    if len(shape) == 1:
        usual = float("norm" in key and key.endswith("weight"))
        spread = 0.05 * torch.randn(shape, generator=generator) if drawn_vectors else torch.zeros(shape)
        return usual + spread
    noise = torch.randn(shape, generator=generator)
    if "embedding.weight" in key:
        return noise * 0.02
    fan_in = torch.Size(shape[1:]).numel()
    return noise / fan_in**0.5
