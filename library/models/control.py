"""Make, load and save ControlNets of SD1, SD2 and SDXL: Diffusers folders, original single files (with or without
prefix), single files with diffusers' names. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoint import control_keys
from library.checkpoint.control_keys import CONTROL_PREFIX, PART
from library.checkpoint.folders import atomic_folder
from library.checkpoint.io import (
    LazyTensor,
    ModelFile,
    atomic_write_json,
    open_model_file,
    read_header,
    save_pickle,
    save_safetensors,
)
from library.checkpoint.keymap import MappedFile
from library.log import UserError, first_line
from library.models import build, infer
from library.models.load import Target, folder_tensors, weight_files
from library.models.spec import UNetSpec

if TYPE_CHECKING:
    from diffusers import ControlNetModel

HINT_WIDTHS = (16, 32, 96, 256)
_HINT = "controlnet_cond_embedding."
_ZERO = ("controlnet_down_blocks.", "controlnet_mid_block.")
WEIGHTS_STEM = "diffusion_pytorch_model"
_PICKLED = (".ckpt", ".pt")
_DIFFUSERS_MARKER = "controlnet_cond_embedding.conv_in.weight"
_OTHER_KINDS = {
    "lora_controlnet": "a Control-LoRA",
    "lllite_unet_": "ControlNet-LLLite weights: name it with --control_net_lllite_models",
    "adapter.": "a T2I adapter",
    "body.": "a T2I adapter",
    "task_embedding": "a ControlNet union",
}


def control_config(spec: UNetSpec) -> dict[str, Any]:
    """The diffusers configuration of a ControlNet for a U-Net."""
    from diffusers import ControlNetModel

    known = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in build.unet_config(spec).items() if name in known}
    middle = "UNetMidBlock2DCrossAttn" if spec.mid_depth else "UNetMidBlock2D"
    return {**config, "mid_block_type": middle, "conditioning_embedding_out_channels": HINT_WIDTHS}


def empty_control(config: Mapping[str, Any]) -> ControlNetModel:
    """A ControlNet without weights, on the meta device, with torch's scaled dot product attention."""
    from diffusers import ControlNetModel
    from diffusers.models.attention_processor import AttnProcessor2_0

    known = inspect.signature(ControlNetModel.__init__).parameters
    with build.without_values():
        net = ControlNetModel(**{name: value for name, value in config.items() if name in known})
    build.take_any_size(net)
    net.set_attn_processor(AttnProcessor2_0())
    return net


def fresh_control(unet: nn.Module, spec: UNetSpec, target: Target) -> ControlNetModel:
    """A ControlNet that changes nothing yet (arXiv:2302.05543, section 3.1), frozen: the U-Net's own encoder and middle
    block, a block that reads guide pictures, drawn from torch's generator, and convolutions of zeros at all outputs.
    """
    net = empty_control(control_config(spec))
    return build.fill(net, _beginning(net, unet, spec.widths[0]), target.dtype, target.device)


def _beginning(net: nn.Module, unet: nn.Module, width: int) -> Iterator[tuple[str, Tensor]]:
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

    hint = ControlNetConditioningEmbedding(width, block_out_channels=HINT_WIDTHS)  # its last kernel is zero too
    begun = {**unet.state_dict(), **{_HINT + key: tensor for key, tensor in hint.state_dict().items()}}
    for key, shape in build.shapes_of(net).items():
        yield key, torch.zeros(shape) if key.startswith(_ZERO) else begun[key]


def take_rgb(net: ControlNetModel) -> None:
    """Turn a net that takes guide pictures as BGR into the same net for RGB: original files cannot tell the order."""
    if net.config["controlnet_conditioning_channel_order"] != "bgr":
        return
    kernel = net.controlnet_cond_embedding.conv_in.weight
    kernel.data = kernel.data.flip(1)
    net.register_to_config(controlnet_conditioning_channel_order="rgb")


# ---- loading


def load_control(path: Path, spec: UNetSpec, target: Target, base: nn.Module | None = None) -> ControlNetModel:
    """The ControlNet of a file or folder for a U-Net of this structure, frozen, in eval mode.

    ``base``: the U-Net to whose encoder a file of differences is added. Raises UserError for what is no ControlNet, or
    one for another kind of model.
    """
    net = _load_folder(path, target) if path.is_dir() else _load_file(path, spec, target, base)
    _check_fit(path, net, spec)
    return net


def _load_folder(folder: Path, target: Target) -> ControlNetModel:
    config = infer.read_config(folder)
    if config.get("_class_name", "ControlNetModel") != "ControlNetModel":
        raise UserError(f"{folder} holds a {config['_class_name']}, no ControlNet that can be used here")
    try:
        net = empty_control(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: its config.json describes no ControlNet ({first_line(error)})") from error
    tensors = folder_tensors(weight_files(folder, WEIGHTS_STEM), PART, build.shapes_of(net))
    return build.fill(net, tensors, target.dtype, target.device)


def _load_file(path: Path, spec: UNetSpec, target: Target, base: nn.Module | None) -> ControlNetModel:
    infos, _ = read_header(path)
    if _DIFFUSERS_MARKER in infos:
        net = empty_control(control_config(structure_of_keys(infos, spec)))
        return build.fill(net, folder_tensors([path], PART, build.shapes_of(net)), target.dtype, target.device)
    prefix = control_keys.prefix_of(infos)
    if prefix is None:
        kind = next((kind for start, kind in _OTHER_KINDS.items() if any(key.startswith(start) for key in infos)), None)
        raise UserError(f"{path} holds no ControlNet" + (f" but {kind}" if kind else ""))
    table = control_keys.key_map(spec, prefix)
    table.check(infos, str(path))
    net = empty_control(control_config(spec))
    with open_model_file(path) as file:
        tensors = MappedFile(file, table.part(PART), {}).tensors(build.shapes_of(net))
        if control_keys.DIFFERENCE in file.infos:
            tensors = _added(tensors, spec, base, file)
        return build.fill(net, tensors, target.dtype, target.device)


def _added(
    tensors: Iterator[tuple[str, Tensor]], spec: UNetSpec, base: nn.Module | None, file: ModelFile
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file of differences, those of the encoder on top of the U-Net's own."""
    if base is None:
        raise ValueError(f"{file.path} holds differences; the U-Net that they belong to is needed")
    own = base.state_dict()
    shared = {key for _, key, _ in control_keys.encoder_rows(spec)}
    for key, tensor in tensors:
        yield key, tensor.float() + own[key].float().cpu() if key in shared else tensor


def structure_of_keys(keys: Collection[str], spec: UNetSpec) -> UNetSpec:
    """The U-Net's structure with the depths that a file with diffusers' names really has: small ControlNets of SDXL
    have fewer transformer blocks than the U-Net, or none.
    """

    def depth(transformer: str) -> int:
        pattern = re.compile(rf"{re.escape(transformer)}\.transformer_blocks\.(\d+)\.norm1\.weight")
        return sum(1 for key in keys if pattern.fullmatch(key))

    depths = tuple(depth(f"down_blocks.{level}.attentions.0") for level in range(len(spec.widths)))
    return replace(spec, depths=depths, mid_depth=depth("mid_block.attentions.0"))


def _check_fit(path: Path, net: ControlNetModel, spec: UNetSpec) -> None:
    """Its outputs must fit the skip connections, its inputs what the model gives."""
    config: Any = net.config
    found = (tuple(config.block_out_channels), config.cross_attention_dim, config.addition_embed_type == "text_time")
    wanted = (spec.widths, spec.context_width, spec.vector_width is not None)
    if found != wanted or len(net.controlnet_down_blocks) != control_keys.skip_count(spec):
        raise UserError(
            f"{path} is a ControlNet for another kind of model: widths {found[0]}, text width {found[1]}; "
            f"this model has {wanted[0]} and {wanted[1]}"
        )


# ---- saving


def save_control(
    path: Path, net: ControlNetModel, spec: UNetSpec, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write a net for a U-Net of this structure: without a suffix a Diffusers folder, else an original single file,
    pickled for .ckpt and .pt. Nets with fewer transformer blocks than the U-Net have no original names: their files
    have those of diffusers.
    """
    if not path.suffix:
        save_control_folder(path, net, dtype)
    elif structure_of_keys(build.shapes_of(net), spec) == spec:
        save_control_file(path, net, spec, dtype, metadata)
    else:
        _write_file(path, build.canonical_state(net), dtype, metadata)


def save_control_file(
    path: Path,
    net: nn.Module,
    spec: UNetSpec,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    prefix: str = CONTROL_PREFIX,
) -> None:
    """Write an original single file. ``prefix``: "" for files without the usual prefix. A path that ends in .ckpt or
    .pt gives a pickled one, in which metadata have no place.
    """
    tensors = control_keys.key_map(spec, prefix).to_file({PART: build.canonical_state(net)})
    _write_file(path, tensors, dtype, metadata)


def _write_file(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> None:
    if path.suffix not in _PICKLED:
        save_safetensors(path, tensors, metadata, dtype)
    else:
        save_pickle(path, tensors, dtype)


def save_control_folder(folder: Path, net: ControlNetModel, dtype: torch.dtype | None = None) -> None:
    """Write a Diffusers folder; an existing one is replaced as a whole."""
    config = {name: value for name, value in dict(net.config).items() if not name.startswith("_")}
    with atomic_folder(folder) as temporary:
        atomic_write_json(temporary / "config.json", {"_class_name": "ControlNetModel", **config})
        state = build.canonical_state(net)
        save_safetensors(temporary / f"{WEIGHTS_STEM}.safetensors", state, {"format": "pt"}, dtype)
