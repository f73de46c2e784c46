"""Which layers of a model get an adapter, found by path, and what they are called in files.

Class names of the model libraries play no part. The set of layers that the model's structure promises is compared with
what is there, so a renamed or missing layer is an error and never a silently smaller network.

A layer's name in files is its path in the U-Net that is given: a family whose files have other paths than diffusers has
in memory (SDXL: those of Stability files) gives a view with these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from library.checkpoint.unet_paths import LayerPath, has_file_paths, layer_paths, structure_of
from library.log import UserError
from networks.block_weights import BlockLayout, block_of, layout_of_levels

Part = Literal["text_encoder", "unet"]
TextEncoders = nn.Module | Sequence[nn.Module] | None

UNET_PREFIX = "lora_unet"
_TEXT_LAYER = re.compile(r"^(?:text_model\.)*encoder\.layers\.(\d+)$")
TEXT_LAYER_PARTS = (
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
_IN_BLOCK = re.compile(r"^(?:down_blocks|up_blocks|mid_block)\.")
_IN_ANY_BLOCK = re.compile(r"^(?:down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)\.")


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that may get an adapter. ``block`` is its block index in the U-Net, None in a text encoder.

    ``other_names`` are what other programs call it in their files.
    """

    name: str
    path: str
    layer: nn.Module
    part: Part
    encoder: int = 0
    block: int | None = None
    other_names: tuple[str, ...] = ()

    @property
    def is_spatial(self) -> bool:
        """True for a convolution with a kernel larger than 1x1."""
        return isinstance(self.layer, nn.Conv2d) and tuple(self.layer.kernel_size) != (1, 1)


def as_list(text_encoder: TextEncoders) -> list[nn.Module]:
    """The text encoders of a plug-in call: one model, several, or none."""
    if text_encoder is None:
        return []
    return [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)


def text_encoder_prefixes(count: int) -> tuple[str, ...]:
    """Name prefixes in files: ``lora_te`` for a single encoder, ``lora_te1``, ``lora_te2`` for several."""
    return ("lora_te",) if count == 1 else tuple(f"lora_te{index + 1}" for index in range(count))


def text_encoder_name(prefix: str, path: str) -> str:
    """Name of a text encoder layer in files; it always has ``text_model``, whatever the path in memory begins with."""
    while path.startswith("text_model."):
        path = path.removeprefix("text_model.")
    return f"{prefix}_text_model_{path}".replace(".", "_")


def unet_name(path: str) -> str:
    """Name of a U-Net layer in files, of its path (SD1 and SD2: in diffusers; SDXL: in Stability files)."""
    return f"{UNET_PREFIX}_{path}".replace(".", "_")


def block_layout(unet: nn.Module) -> BlockLayout:
    """How the blocks of this U-Net are counted. Raises UserError for another kind of model."""
    spec = structure_of(unet)
    if spec is None:
        raise UserError("U-Net: no down blocks found; is it another kind of model?")
    return layout_of_levels(len(spec.widths))


def find_targets(text_encoder: TextEncoders, unet: nn.Module, with_convolutions: bool) -> list[Target]:
    """The layers of a whole model, text encoders first; there may be no text encoder."""
    return [
        *text_encoder_targets(text_encoder),
        *unet_targets(unet, with_convolutions),
    ]


def text_encoder_targets(text_encoder: TextEncoders) -> list[Target]:
    """Attention projections and MLP layers of every encoder layer. Raises UserError if a layer lacks one of its six."""
    encoders = as_list(text_encoder)
    prefixes = text_encoder_prefixes(len(encoders))
    found: list[Target] = []
    for index, (encoder, prefix) in enumerate(zip(encoders, prefixes, strict=True)):
        modules = dict(encoder.named_modules())
        expected = [f"{path}.{part}" for path in modules if _TEXT_LAYER.match(path) for part in TEXT_LAYER_PARTS]
        _require(expected, modules, f"text encoder {index + 1}")
        # Diffusers' files number only the second encoder
        other = ("lora_te",) if prefix == "lora_te1" else ()
        found += [
            Target(
                text_encoder_name(prefix, path),
                path,
                modules[path],
                "text_encoder",
                encoder=index,
                other_names=tuple(text_encoder_name(name, path) for name in other),
            )
            for path in expected
        ]
    return found


def unet_targets(unet: nn.Module, with_convolutions: bool) -> list[Target]:
    """The U-Net's layers in the order in which the model holds them, those under the paths of files in that of files.

    Without convolutions: everything inside the transformers. With: every weight of two or more dimensions inside the
    down, up and middle blocks (so also ResNets, their shortcuts and the samplers). Never the first and last convolution
    and the embedding layers. Raises UserError if the blocks hold other layers than their structure promises.
    """
    modules = dict(unet.named_modules())
    paths, by_file = _paths_of(unet), has_file_paths(unet)
    expected = {
        path.file if by_file else path.memory: path
        for path in paths
        if _IN_BLOCK.match(path.memory) and not path.is_norm and (with_convolutions or ".attentions." in path.memory)
    }
    _require(list(expected), modules, "U-Net")
    known = {path.file if by_file else path.memory for path in paths}
    unknown = [path for path, module in modules.items() if _is_layer(module) and _IN_ANY_BLOCK.match(path)]
    unknown = [path for path in unknown if path not in known]
    if unknown:
        raise UserError(f"the U-Net has {len(unknown)} layers that no adapter layout knows, first {unknown[0]}")
    layout = block_layout(unet)
    order = expected if by_file else [place for place in modules if place in expected]
    return [_target(expected[place], modules[place], by_file, layout) for place in order]


def outer_targets(unet: nn.Module) -> list[Target]:
    """Layers outside of the blocks: first and last convolution, embeddings of time and sizes.

    New networks leave them alone; files of other programs have adapters for them. They belong to no block.
    """
    modules, by_file = dict(unet.named_modules()), has_file_paths(unet)
    places = {path.file if by_file else path.memory: path for path in _paths_of(unet)}
    found = {place: path for place, path in places.items() if _is_layer(modules.get(place))}
    outside = {place: path for place, path in found.items() if not _IN_BLOCK.match(path.memory)}
    return [_target(path, modules[place], by_file) for place, path in outside.items()]


def _paths_of(unet: nn.Module) -> tuple[LayerPath, ...]:
    spec = structure_of(unet)
    return () if spec is None else layer_paths(spec)


def _target(path: LayerPath, layer: nn.Module, by_file: bool, layout: BlockLayout | None = None) -> Target:
    """A layer of the U-Net; ``layout`` None: it stands outside of the blocks."""
    place, others = (path.file, (unet_name(path.memory),)) if by_file else (path.memory, ())
    block = None if layout is None else block_of(place, layout)
    return Target(unet_name(place), place, layer, "unet", block=block, other_names=others)


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _require(expected: Sequence[str], modules: dict[str, nn.Module], what: str) -> None:
    if not expected:
        raise UserError(f"{what}: no layers found that an adapter could be attached to; is it another kind of model?")
    missing = [path for path in expected if not _is_layer(modules.get(path))]
    if missing:
        raise UserError(
            f"{what}: {len(missing)} of {len(expected)} layers that should get an adapter are missing, "
            f"first {missing[0]}; the installed diffusers or transformers may have renamed its layers"
        )
