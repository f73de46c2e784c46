"""SDXL's U-Net under the paths of Stability files, for network plug-ins.

Networks call a layer by its path. LoRA files for SDXL have the Stability paths (``input_blocks.4.1...``) while
diffusers builds the U-Net with its own (``down_blocks.1.attentions.0...``). The view holds the same layers in
containers that are nested and named as in a file, so every plug-in reads and writes the names that other programs know.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from library.checkpoint.unet_paths import layer_paths, structure_of
from library.families.plugin_views import PluginView, name_for_plugins
from library.log import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_BLOCK = re.compile(r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.\d+")


class Container(nn.Module):
    """A level of the paths. It computes nothing: the layers in it are called by the real U-Net."""


class ResnetBlock2D(Container):
    """The layers of a ResNet, under the class name that plug-ins look for."""


class Downsample2D(Container):
    """The layer of a downsampler, under the class name that plug-ins look for."""


class Upsample2D(Container):
    """The layer of an upsampler, under the class name that plug-ins look for."""


_CONTAINERS: dict[str, type[Container]] = {
    "resnets": ResnetBlock2D,
    "downsamplers": Downsample2D,
    "upsamplers": Upsample2D,
}


class UNetView(PluginView):
    """The U-Net's layers under the paths of a Stability file."""


def sdxl_view(unet: UNet2DConditionModel) -> UNetView:
    """A view of the U-Net that shares all its layers; its state dict has the keys of a Stability file.

    Blocks of the U-Net get the class names that plug-ins look for (`name_for_plugins`). Raises UserError if a layer of
    its structure is missing.
    """
    name_for_plugins(unet)
    spec = structure_of(unet)
    if spec is None:
        raise ValueError("no U-Net of the Stable Diffusion kind")
    view = UNetView(unet)
    for path in layer_paths(spec):
        block = _BLOCK.search(path.memory)
        if block is None:
            _place(view, path.file, _layer(unet, path.memory))
            continue
        root = _block_root(path.file)
        if block["kind"] == "attentions":  # the same paths inside on both sides
            _place(view, root, _layer(unet, path.memory[: block.end()]))
        else:
            holder = _place(view, root, _CONTAINERS[block["kind"]]())
            _place(holder, path.file.removeprefix(f"{root}."), _layer(unet, path.memory))
    return view


def _layer(unet: nn.Module, path: str) -> nn.Module:
    try:
        return unet.get_submodule(path)
    except AttributeError:
        raise UserError(f"the U-Net has no layer {path}; the installed diffusers may have renamed it") from None


def _block_root(file_path: str) -> str:
    """``input_blocks.4.0`` or ``middle_block.0`` of a path inside it."""
    levels = 2 if file_path.startswith("middle_block.") else 3
    return ".".join(file_path.split(".")[:levels])


def _place(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put the module at the path, unless one stands there already; returns the one that stands there."""
    holder = root
    *parents, last = path.split(".")
    for name in parents:
        holder = _child(holder, name, Container())
    return _child(holder, last, module)


def _child(holder: nn.Module, name: str, otherwise: nn.Module) -> nn.Module:
    if name not in holder._modules:  # pyright: ignore[reportPrivateUsage]
        holder.add_module(name, otherwise)
    return holder.get_submodule(name)
