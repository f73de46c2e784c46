"""The model that pictures are drawn with: found, recognised, loaded."""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from library.device import choose_device, xformers_problem
from library.diffusion.schedule import NoiseSchedule, make_schedule
from library.families import family_named
from library.families.base import ModelFamily, ModelParts
from library.families.stable import may_be_hub_id
from library.log import UserError
from library.models.load import Recognised, recognise
from library.models.memory import set_attention
from library.models.spec import FAMILY_TITLES, FamilyName
from library.options import ModelOptions
from library.options.generation import DrawOptions, GenModelOptions

_FAMILIES_BY_OPTION: dict[str, FamilyName] = {"sdxl": "sdxl", "v1": "sd1", "v2": "sd2"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, with the noise schedule that it was trained with."""

    family: ModelFamily
    parts: ModelParts
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype


def load_model(options: GenModelOptions, draw: DrawOptions) -> LoadedModel:
    """Load what ``--ckpt`` names. Raises UserError for what cannot be used here, before weights are read."""
    device = choose_device()
    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
    _check_device(options, device)
    if not options.ckpt:
        raise UserError("--ckpt is missing: the model to draw with, a file, a Diffusers folder or a hub id")
    given, found = find_model(options.ckpt)
    family = family_named(_kind(options, given, found), options.tokenizer_cache_dir)
    v_prediction = options.v_parameterization or (found is not None and found.prediction_type == "v_prediction")
    model = ModelOptions(
        pretrained_model_name_or_path=given,
        v2=family.name == "sd2",
        v_parameterization=v_prediction,
        vae=options.vae,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
    )
    vae_dtype = torch.float32 if options.no_half_vae else dtype
    try:
        parts = family.load(model, dtype=dtype, device=device, part_dtypes={"vae": vae_dtype})
    except UserError as error:  # families know the option by the name that it has in training
        raise UserError(str(error).replace("--pretrained_model_name_or_path", "--ckpt")) from error
    set_attention(parts.unet, "xformers" if options.xformers or options.diffusers_xformers else "sdpa")
    _arrange_memory(parts, options, draw)
    schedule = make_schedule(parts.prediction_type, options.zero_terminal_snr or parts.zero_terminal_snr)
    return LoadedModel(family, parts, schedule.to(device), device, dtype)


def find_model(given: str) -> tuple[str, Recognised | None]:
    """The path (or hub id) that ``--ckpt`` means, and what it is; None for what must be fetched first.

    What does not exist may be a pattern that one file fits. Raises UserError.
    """
    path = Path(given).expanduser()
    if not path.exists() and glob.has_magic(given):
        matches = sorted(glob.glob(str(path)))
        if len(matches) != 1:
            raise UserError(f"--ckpt {given}: {len(matches)} files fit this pattern; one is needed")
        path = Path(matches[0])
    if path.exists():
        return str(path), recognise(path)
    return given, None


def _kind(options: GenModelOptions, given: str, found: Recognised | None) -> FamilyName:
    """The model's family: by its tensors, else as the options say. Raises UserError."""
    asked = [name for name in _FAMILIES_BY_OPTION if getattr(options, name)]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} exclude each other: say one kind of model")
    if found is None:
        if not may_be_hub_id(given):
            raise UserError(f"--ckpt {given}: there is no such file or folder")
        if not asked:
            logger.info("--ckpt %s: taken for a model of SD 1.x; say so with --v2 or --sdxl if it is another", given)
        return _FAMILIES_BY_OPTION[asked[0]] if asked else "sd1"
    kind = found.spec.family
    if asked and _FAMILIES_BY_OPTION[asked[0]] != kind:
        advice = "draw it with gen_img.py, without --sdxl" if asked[0] == "sdxl" else "leave the option out"
        raise UserError(f"--{asked[0]}: {given} is another kind of model, {FAMILY_TITLES[kind]}; {advice}")
    return kind


def _check_device(options: GenModelOptions, device: torch.device) -> None:
    if options.fp16 and device.type == "cpu":
        raise UserError("--fp16 does not work on a CPU; use --bf16 or neither")
    if options.xformers or options.diffusers_xformers:
        problem = xformers_problem(device)
        if problem:
            raise UserError(f"--xformers: {problem}; leave it out, torch's own attention is used then")


def _arrange_memory(parts: ModelParts, options: GenModelOptions, draw: DrawOptions) -> None:
    """Where parts wait, memory layout, compilation, and how the VAE divides its work."""
    vae = cast(Any, parts.vae)
    if options.lowram:
        for module in (*parts.text_encoders, parts.vae):
            nn.Module.to(module, "cpu")
    if options.opt_channels_last:
        for module in (parts.unet, parts.vae):
            cast(nn.Module, module).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if options.torch_compile:
        parts.unet.compile_repeated_blocks(dynamic=False)
    if draw.vae_slices or draw.vae_tiling:
        vae.enable_tiling()
        if draw.vae_slices:  # bands as wide as the picture would be no saving in its decoder: tiles are
            logger.info("--vae_slices: the VAE works in tiles")
