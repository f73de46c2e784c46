"""Recognise a model (family, widths, depths, prediction type) from a file's header or a Diffusers folder's configs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from library.checkpoint.io import TensorInfo
from library.checkpoint.sd_keys import HUGGINGFACE_PREFIX, OPENCLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, aliases
from library.checkpoint.sdxl_keys import TEXT_PREFIXES as SDXL_TEXT_PREFIXES
from library.log import UserError
from library.models.spec import (
    SD1,
    SD2,
    SDXL,
    SDXL_LATENT_SCALE,
    ArchitectureSpec,
    FamilyName,
    PredictionType,
    TextEncoderSpec,
    UNetSpec,
    VaeSpec,
)

Infos = Mapping[str, TensorInfo]
HEAD_WIDTH = 64  # CLIP's heads always, and SD2's in the U-Net
SD1_HEADS = 8
PUBLISHED_WIDTH = 320  # of the first level; narrower models are small ones
SMALL_SAMPLE_SIZE = 8
SIZES = 6  # numbers of SDXL's size condition


def family_of_keys(infos: Infos) -> FamilyName | Literal["unknown"]:
    """The family of a single file by its text encoder's names; "unknown" if it is no whole Stable Diffusion model."""
    if any(key.startswith(("conditioner.embedders.", UNET_PREFIX + "label_emb.")) for key in infos):
        return "sdxl"
    if UNET_PREFIX + "input_blocks.0.0.weight" not in infos:
        return "unknown"
    if OPENCLIP_PREFIX + "token_embedding.weight" in infos:
        return "sd2"
    token_embedding = "embeddings.token_embedding.weight"
    if any(HUGGINGFACE_PREFIX + level + token_embedding in infos for level in ("text_model.", "")):
        return "sd1"
    return "unknown"


def spec_of_file(infos: Infos, where: str) -> ArchitectureSpec:
    """The architecture of an SD1, SD2 or SDXL single file. Raises UserError for anything else."""
    family = family_of_keys(infos)
    if family == "unknown":
        raise UserError(f"{where} is no whole Stable Diffusion model: U-Net or text encoder were not found in it")
    if family == "sdxl" and not any(key.startswith(SDXL_TEXT_PREFIXES[0]) for key in infos):
        raise UserError(f"{where} has no first SDXL text encoder: a refiner or a part of a model cannot be used here")
    real = {**infos, **{table: infos[key] for table, key in aliases(infos).items()}}
    try:
        return _spec_of_sdxl(real) if family == "sdxl" else _spec_of_sd(real, family)
    except KeyError as error:
        raise UserError(f"{where} lacks the tensor {error.args[0]}: it is incomplete or of another kind") from error
    except (IndexError, ValueError) as error:
        raise UserError(f"{where} has tensors of impossible shapes: it is damaged or of another kind") from error


def _spec_of_sd(infos: Infos, family: FamilyName) -> ArchitectureSpec:
    if family == "sd1":
        text = _huggingface(infos, HUGGINGFACE_PREFIX)
    else:
        text = _openclip(infos, OPENCLIP_PREFIX)
        # SD2 takes the next to last state: the last block is never run. Some converters already left it out.
        text = text if text.layers == SD2.text_encoders[0].layers else replace(text, layers=text.layers - 1)
    return ArchitectureSpec(family, _unet(infos, family), (text,), vae_spec_of_keys(infos, VAE_PREFIX))


def _spec_of_sdxl(infos: Infos) -> ArchitectureSpec:
    first, second = SDXL_TEXT_PREFIXES
    projection = second + ("text_projection" if second + "text_projection" in infos else "text_projection.weight")
    pooled_width = _shape(infos, projection)[1 if projection.endswith("text_projection") else 0]
    vector_width = _shape(infos, UNET_PREFIX + "label_emb.0.0.weight")[1]
    return ArchitectureSpec(
        "sdxl",
        replace(_unet(infos, "sdxl"), vector_width=vector_width, size_width=(vector_width - pooled_width) // SIZES),
        (_huggingface(infos, first), replace(_openclip(infos, second), projection_width=pooled_width)),
        replace(vae_spec_of_keys(infos, VAE_PREFIX), scaling_factor=SDXL_LATENT_SCALE),
    )


def prediction_of_file(infos: Infos, metadata: Mapping[str, str]) -> PredictionType | None:
    """What a single file says of its prediction type: marker tensors, then modelspec metadata; None if nothing."""
    if "v_pred" in infos or "ztsnr" in infos:
        return "v_prediction"
    said = metadata.get("modelspec.prediction_type", "").lower()
    if said:
        return "v_prediction" if said.startswith("v") else "epsilon"
    if metadata.get("modelspec.architecture", "").endswith("-768-v"):
        return "v_prediction"
    return None


def zero_snr_of_file(infos: Infos) -> bool:
    """True if a single file's marker says that its noise schedule ended in pure noise (zero terminal SNR)."""
    return "ztsnr" in infos


def _shape(infos: Infos, key: str) -> tuple[int, ...]:
    return infos[key].shape


def _indices(infos: Infos, pattern: str) -> set[int]:
    compiled = re.compile(pattern)
    return {int(match.group(1)) for key in infos if (match := compiled.match(key))}


def _unet(infos: Infos, family: FamilyName) -> UNetSpec:
    prefix = re.escape(UNET_PREFIX)
    out_channels, in_channels = (
        _shape(infos, UNET_PREFIX + "out.2.weight")[0],
        _shape(infos, UNET_PREFIX + "input_blocks.0.0.weight")[1],
    )
    downsamplers = sorted(_indices(infos, rf"{prefix}input_blocks\.(\d+)\.0\.op\.weight"))
    layers = downsamplers[0] - 1 if downsamplers else 2
    widths: list[int] = []
    depths: list[int] = []
    for level in range(len(downsamplers) + 1):
        block = f"{UNET_PREFIX}input_blocks.{level * (layers + 1) + 1}"
        widths.append(_shape(infos, f"{block}.0.out_layers.3.weight")[0])
        depths.append(len(_indices(infos, rf"{re.escape(block)}\.1\.transformer_blocks\.(\d+)\.norm1\.weight")))
    middle = f"{UNET_PREFIX}middle_block.1"
    projection = _shape(infos, f"{middle}.proj_in.weight")
    # SD2 projections are kept as matrices in memory, whatever form the file has
    linear = family != "sd1" or len(projection) == 2
    heads = [SD1_HEADS] * len(widths) if family == "sd1" else [max(1, width // HEAD_WIDTH) for width in widths]
    usual_size = (SDXL if family == "sdxl" else SD1).unet.sample_size
    return UNetSpec(
        widths=tuple(widths),
        depths=tuple(depths),
        heads=tuple(heads),
        mid_depth=len(_indices(infos, rf"{re.escape(middle)}\.transformer_blocks\.(\d+)\.norm1\.weight")),
        context_width=_shape(infos, f"{middle}.transformer_blocks.0.attn2.to_k.weight")[1],
        linear_projection=linear,
        layers_per_level=layers,
        in_channels=in_channels,
        out_channels=out_channels,
        sample_size=usual_size if widths[0] >= PUBLISHED_WIDTH else SMALL_SAMPLE_SIZE,
    )


def _huggingface(infos: Infos, prefix: str) -> TextEncoderSpec:
    root = prefix + "text_model."
    vocabulary, width = _shape(infos, root + "embeddings.token_embedding.weight")
    return TextEncoderSpec(
        width=width,
        mlp_width=_shape(infos, root + "encoder.layers.0.mlp.fc1.weight")[0],
        heads=max(1, width // HEAD_WIDTH),
        layers=len(_indices(infos, rf"{re.escape(root)}encoder\.layers\.(\d+)\.layer_norm1\.weight")),
        activation="quick_gelu",
        vocabulary=vocabulary,
        positions=_shape(infos, root + "embeddings.position_embedding.weight")[0],
    )


def _openclip(infos: Infos, root: str) -> TextEncoderSpec:
    vocabulary, width = _shape(infos, root + "token_embedding.weight")
    blocks = len(_indices(infos, rf"{re.escape(root)}transformer\.resblocks\.(\d+)\.ln_1\.weight"))
    return TextEncoderSpec(
        width=width,
        mlp_width=_shape(infos, root + "transformer.resblocks.0.mlp.c_fc.weight")[0],
        heads=max(1, width // HEAD_WIDTH),
        layers=blocks,
        activation="gelu",
        vocabulary=vocabulary,
        positions=_shape(infos, root + "positional_embedding")[0],
        layout="openclip",
    )


def vae_spec_of_keys(infos: Infos, prefix: str = "") -> VaeSpec:
    """Widths of a VAE in Stability naming below ``prefix``. Raises KeyError for a missing tensor."""
    levels = sorted(_indices(infos, rf"{re.escape(prefix)}encoder\.down\.(\d+)\.block\.0\.conv2\.weight"))
    if not levels:
        raise KeyError(f"{prefix}encoder.down.0.block.0.conv2.weight")
    widths = tuple(_shape(infos, f"{prefix}encoder.down.{level}.block.0.conv2.weight")[0] for level in levels)
    layers = len(_indices(infos, rf"{re.escape(prefix)}encoder\.down\.0\.block\.(\d+)\.conv2\.weight"))
    return VaeSpec(widths, layers, _shape(infos, f"{prefix}post_quant_conv.weight")[0])


# ---- Diffusers folders


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A folder's configuration. Raises UserError that names the file."""
    path = folder / name
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {folder.parent} is no whole Diffusers model") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is no configuration")
    return loaded


def spec_of_folder(folder: Path) -> ArchitectureSpec:
    """The architecture of an SD1, SD2 or SDXL Diffusers folder. Raises UserError for anything else."""
    try:
        return _spec_of_configs(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is another kind of model, or its configurations are damaged ({error})") from error


def _spec_of_configs(folder: Path) -> ArchitectureSpec:
    unet = _unet_of_config(read_config(folder / "unet"))
    vae = vae_spec_of_config(read_config(folder / "vae"))
    text = _text_spec(read_config(folder / "text_encoder"))
    if unet.vector_width is not None and not (folder / "text_encoder_2").is_dir():
        raise UserError(f"{folder} is an SDXL model, but its folder text_encoder_2 is missing")
    if unet.vector_width is not None:
        config = read_config(folder / "text_encoder_2")
        second = replace(_text_spec(config), projection_width=config.get("projection_dim", 512), layout="openclip")
        # some folders carry the scale of SD 1.x by mistake
        return ArchitectureSpec("sdxl", unet, (text, second), replace(vae, scaling_factor=SDXL_LATENT_SCALE))
    return ArchitectureSpec("sd2" if text.layout == "openclip" else "sd1", unet, (text,), vae)


def prediction_of_folder(folder: Path) -> PredictionType | None:
    """The scheduler configuration's prediction type; None if it says nothing."""
    said = _scheduler(folder).get("prediction_type")
    return "v_prediction" if said == "v_prediction" else "epsilon" if said == "epsilon" else None


def zero_snr_of_folder(folder: Path) -> bool:
    """True if the scheduler's configuration asks for a schedule that ends in pure noise (zero terminal SNR)."""
    return bool(_scheduler(folder).get("rescale_betas_zero_snr", False))


def _scheduler(folder: Path) -> dict[str, Any]:
    place = folder / "scheduler"
    name = "scheduler_config.json"
    return read_config(place, name) if (place / name).is_file() else {}


def _unet_of_config(config: dict[str, Any]) -> UNetSpec:
    widths = tuple(config["block_out_channels"])
    depth = config.get("transformer_layers_per_block", 1)
    per_level = [depth] * len(widths) if isinstance(depth, int) else list(depth)
    if not all(isinstance(depth, int) for depth in per_level):
        raise ValueError(f"transformer_layers_per_block is {per_level}, which differs within a level")
    kinds = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"]
    depths = tuple(d if "CrossAttn" in kind else 0 for d, kind in zip(per_level, kinds, strict=True))
    # "attention_head_dim" of these configs is the number of heads
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", SD1_HEADS)
    has_vector = config.get("addition_embed_type") == "text_time"
    return UNetSpec(
        widths=widths,
        depths=depths,
        heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        mid_depth=per_level[-1],
        context_width=config.get("cross_attention_dim", 768),
        linear_projection=bool(config.get("use_linear_projection", False)),
        layers_per_level=config.get("layers_per_block", 2),
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        vector_width=config.get("projection_class_embeddings_input_dim") if has_vector else None,
        size_width=config.get("addition_time_embed_dim") or SDXL.unet.size_width,
        sample_size=config.get("sample_size") or 64,
        upcast_attention=bool(config.get("upcast_attention", False)),
    )


def _text_spec(config: dict[str, Any]) -> TextEncoderSpec:
    activation = config.get("hidden_act", "quick_gelu")
    return TextEncoderSpec(
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        activation=activation,
        vocabulary=config.get("vocab_size", 49408),
        positions=config.get("max_position_embeddings", 77),
        layout="openclip" if activation == "gelu" else "huggingface",
    )


def vae_spec_of_config(config: dict[str, Any]) -> VaeSpec:
    """Widths of a VAE by its Diffusers configuration."""
    return VaeSpec(
        widths=tuple(config["block_out_channels"]),
        layers_per_level=config.get("layers_per_block", 2),
        latent_channels=config.get("latent_channels", 4),
        scaling_factor=config.get("scaling_factor", 0.18215),
        force_upcast=bool(config.get("force_upcast", True)),
    )
