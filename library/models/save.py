"""Write a whole model: Stability single file or Diffusers folder. Nothing is fetched from anywhere."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.checkpoint.io import LazyTensor, atomic_write_json, open_model_file, save_safetensors
from library.checkpoint.sd_keys import OPENCLIP_PREFIX, key_map
from library.models import build
from library.models.spec import ArchitectureSpec, PredictionType

PLACEHOLDER_KEY = "sd_trainer.placeholders"


def save_single_file(
    path: Path,
    spec: ArchitectureSpec,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    source: Path | None = None,
) -> None:
    """Write a Stability file (safetensors) of text_encoder, unet and vae, streamed.

    SD2 files also hold a layer that is never run, a text projection and a logit scale: they are taken from ``source``
    (the single file that the model came from) or made up, and then named in the metadata.
    """
    tensors, notes = whole_state(spec, modules, source)
    save_safetensors(path, tensors, {**(metadata or {}), **notes}, dtype)


def whole_state(
    spec: ArchitectureSpec, modules: Mapping[str, nn.Module], source: Path | None = None
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a single file, made when they are written, and what its metadata must say of them."""
    states = {name: build.canonical_state(module) for name, module in modules.items()}
    tensors = key_map(spec).to_file(states)
    if spec.text_encoders[0].layout != "openclip":
        return tensors, {}
    kept = _kept_from(source, spec)
    if kept:
        return {**tensors, **kept}, {}
    note = "cond_stage_model: last resblock, text_projection, logit_scale"
    return {**tensors, **_placeholders(tensors, spec)}, {PLACEHOLDER_KEY: note}


def _last_block(spec: ArchitectureSpec) -> str:
    return f"{OPENCLIP_PREFIX}transformer.resblocks.{spec.text_encoders[0].layers}."


def _kept_from(source: Path | None, spec: ArchitectureSpec) -> dict[str, LazyTensor]:
    """The unused text encoder tensors of the file that the model came from; small, so read at once."""
    if source is None or not source.is_file():
        return {}
    extras = (f"{OPENCLIP_PREFIX}text_projection", f"{OPENCLIP_PREFIX}logit_scale")
    with open_model_file(source) as file:
        keys = [key for key in file.infos if key.startswith(_last_block(spec)) or key in extras]
        return {key: _constant(file.tensor(key)) for key in keys}


def _placeholders(tensors: Mapping[str, LazyTensor], spec: ArchitectureSpec) -> dict[str, LazyTensor]:
    text = spec.text_encoders[0]
    before = f"{OPENCLIP_PREFIX}transformer.resblocks.{text.layers - 1}."
    copies = {_last_block(spec) + key[len(before) :]: value for key, value in tensors.items() if key.startswith(before)}
    dtype = next(iter(copies.values())).dtype
    return {
        **copies,
        f"{OPENCLIP_PREFIX}text_projection": _constant(torch.ones(text.width, text.width, dtype=dtype)),
        f"{OPENCLIP_PREFIX}logit_scale": _constant(torch.ones((), dtype=dtype)),
    }


def _constant(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)


# ---- Diffusers folders


def save_folder(
    folder: Path,
    spec: ArchitectureSpec,
    modules: Mapping[str, nn.Module],
    prediction_type: PredictionType,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the parts of a Diffusers folder with their configurations (the tokenizer is added by the family).

    The folder must not be in use; `whole_folder` makes the write atomic.
    """
    configs = {"unet": build.unet_config(spec.unet), "vae": build.vae_config(spec.vae)}
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    for name, module in modules.items():
        place = folder / name
        state = build.canonical_state(module)
        if name == "text_encoder":
            config = {
                "architectures": ["CLIPTextModel"],
                "model_type": "clip_text_model",
                **build.text_config(spec.text_encoders[0]),
            }
            file = place / "model.safetensors"
        else:
            config = {"_class_name": classes[name], **configs[name]}
            file = place / "diffusion_pytorch_model.safetensors"
        atomic_write_json(place / "config.json", config)
        save_safetensors(file, state, {"format": "pt"}, dtype)
    atomic_write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(prediction_type))
    atomic_write_json(folder / "model_index.json", model_index())


def scheduler_config(prediction_type: PredictionType) -> dict[str, Any]:
    """The noise schedule that all Stable Diffusion models were trained with."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }


def model_index() -> dict[str, Any]:
    """The table of contents of a Diffusers folder."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


@contextlib.contextmanager
def whole_folder(target: Path) -> Generator[Path]:
    """A temporary sibling that takes the target's place when the block ends well; an older target is then removed."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            os.replace(target, aside)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
