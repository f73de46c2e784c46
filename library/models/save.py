"""Write a whole model: Stability single file or Diffusers folder. Nothing is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoint.io import (
    LazyTensor,
    atomic_write_json,
    open_model_file,
    save_pickle,
    save_safetensors,
)
from library.checkpoint.sd_keys import OPENCLIP_PREFIX
from library.checkpoint.sdxl_keys import LOGIT_SCALE, MARKERS
from library.checkpoint.tables import key_map
from library.models import build
from library.models.spec import (
    PIPELINES,
    TEXT_PARTS,
    WEIGHT_STEMS,
    ArchitectureSpec,
    FamilyName,
    PredictionType,
    TextEncoderSpec,
)

PLACEHOLDER_KEY = "sd_trainer.placeholders"


def save_single_file(
    path: Path,
    spec: ArchitectureSpec,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    source: Path | None = None,
    markers: Iterable[str] = (),
    counters: Mapping[str, int] | None = None,
) -> None:
    """Write a Stability file of the text encoders, unet and vae: safetensors, streamed, or by its suffix a pickled
    .ckpt, which holds ``counters`` (epoch, global_step) but no metadata.

    SD2 files also hold a layer that is never run, a text projection and a logit scale: they are taken from ``source``
    (the single file that the model came from) or made up, and then named in the metadata. SDXL files keep the logit
    scale and the marker tensors of ``source``, and get those that the model needs (see `whole_state`).
    """
    tensors, notes = whole_state(spec, modules, source, markers)
    write_single_file(path, tensors, dtype, {**(metadata or {}), **notes}, counters)


def write_single_file(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    counters: Mapping[str, int] | None = None,
) -> None:
    """Write the tensors of a single file: safetensors, streamed, or by its suffix .ckpt a pickled ``state_dict``.

    A pickle holds ``counters`` beside it, but no metadata, and cannot be streamed: all tensors are in memory at once.
    """
    if path.suffix.lower() != ".ckpt":
        save_safetensors(path, tensors, metadata, dtype)
        return
    save_pickle(path, tensors, dtype, counters or {})


def whole_state(
    spec: ArchitectureSpec,
    modules: Mapping[str, nn.Module],
    source: Path | None = None,
    markers: Iterable[str] = (),
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a single file, made when they are written, and what its metadata must say of them.

    ``markers``: names of empty tensors by which programs see what an SDXL model predicts.
    """
    states = {name: build.canonical_state(module) for name, module in modules.items()}
    return single_file_state(spec, states, source, markers)


def single_file_state(
    spec: ArchitectureSpec,
    states: Mapping[str, Mapping[str, Tensor | LazyTensor]],
    source: Path | None = None,
    markers: Iterable[str] = (),
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The same as `whole_state` from the tensors of the parts by canonical key, which may be read later."""
    tensors = key_map(spec).to_file(states)
    if spec.family == "sdxl":
        marks = {key: _constant(torch.zeros(0)) for key in markers}
        return {**tensors, **marks, **_kept_from(source, lambda key: key in (LOGIT_SCALE, *MARKERS))}, {}
    if spec.family != "sd2":
        return tensors, {}
    extras = (f"{OPENCLIP_PREFIX}text_projection", f"{OPENCLIP_PREFIX}logit_scale")
    kept = _kept_from(source, lambda key: key.startswith(_last_block(spec)) or key in extras)
    if kept:
        return {**tensors, **kept}, {}
    note = "cond_stage_model: last resblock, text_projection, logit_scale"
    return {**tensors, **_placeholders(tensors, spec)}, {PLACEHOLDER_KEY: note}


def _last_block(spec: ArchitectureSpec) -> str:
    return f"{OPENCLIP_PREFIX}transformer.resblocks.{spec.text_encoders[0].layers}."


def _kept_from(source: Path | None, wanted: Callable[[str], bool]) -> dict[str, LazyTensor]:
    """Tensors that no module holds, of the file that the model came from; small, so read at once."""
    if source is None or not source.is_file():
        return {}
    with open_model_file(source) as file:
        return {key: _constant(file.tensor(key)) for key in file.infos if wanted(key)}


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
    zero_terminal_snr: bool = False,
) -> None:
    """Write the parts of a Diffusers folder with their configurations (the tokenizers are added by the family).

    The folder must not be in use; `atomic_folder` makes the write atomic.
    """
    states = {name: build.canonical_state(module) for name, module in modules.items()}
    save_folder_state(folder, spec, states, prediction_type, dtype, zero_terminal_snr)


def save_folder_state(
    folder: Path,
    spec: ArchitectureSpec,
    states: Mapping[str, Mapping[str, Tensor | LazyTensor]],
    prediction_type: PredictionType,
    dtype: torch.dtype | None = None,
    zero_terminal_snr: bool = False,
) -> None:
    """The same as `save_folder` from the tensors of the parts by canonical key, which may be read later."""
    for name, state in states.items():
        atomic_write_json(folder / name / "config.json", _part_config(name, spec))
        save_safetensors(folder / name / f"{WEIGHT_STEMS[name]}.safetensors", state, {"format": "pt"}, dtype)
    scheduler = scheduler_config(prediction_type, spec.family, zero_terminal_snr)
    atomic_write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    atomic_write_json(folder / "model_index.json", model_index(spec))


def _part_config(name: str, spec: ArchitectureSpec) -> dict[str, Any]:
    if name == "unet":
        return {"_class_name": "UNet2DConditionModel", **build.unet_config(spec.unet)}
    if name == "vae":
        return {"_class_name": "AutoencoderKL", **build.vae_config(spec.vae)}
    text = spec.text_encoders[TEXT_PARTS.index(name)]
    return {"architectures": [_text_class(text)], "model_type": "clip_text_model", **build.text_config(text)}


def scheduler_config(
    prediction_type: PredictionType, family: FamilyName, zero_terminal_snr: bool = False
) -> dict[str, Any]:
    """The noise schedule that all Stable Diffusion models were trained with, and the family's usual sampler."""
    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "prediction_type": prediction_type,
        **({"rescale_betas_zero_snr": True} if zero_terminal_snr else {}),
    }
    pipeline = PIPELINES[family]
    return {"_class_name": pipeline.scheduler, **pipeline.scheduler_options, **config}


def model_index(spec: ArchitectureSpec) -> dict[str, Any]:
    """The table of contents of a Diffusers folder."""
    pipeline = PIPELINES[spec.family]
    texts = [["transformers", _text_class(text)] for text in spec.text_encoders]
    tokenizer = ["transformers", "CLIPTokenizer"]
    return {
        "_class_name": pipeline.name,
        "text_encoder": texts[0],
        "tokenizer": tokenizer,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        **({"text_encoder_2": texts[1], "tokenizer_2": tokenizer} if len(texts) > 1 else {}),
        "scheduler": ["diffusers", pipeline.scheduler],
        **pipeline.index_entries,
    }


def _text_class(text: TextEncoderSpec) -> str:
    return "CLIPTextModel" if text.projection_width is None else "CLIPTextModelWithProjection"
