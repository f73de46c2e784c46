"""The layers of a model that adapters may change, told from its description alone: no module is built.

`networks.targets` finds the same layers in a model in memory; a test compares the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.checkpoint.unet_paths import layer_paths
from library.models.spec import ArchitectureSpec, TextEncoderSpec
from networks.block_weights import BlockLayout, block_of, layout_of_levels
from networks.targets import TEXT_LAYER_PARTS, Part, text_encoder_name, text_encoder_prefixes, unet_name

_IN_BLOCK = re.compile(r"^(?:down_blocks|up_blocks|mid_block)\.")


@dataclass(frozen=True, slots=True)
class ModelLayer:
    """A layer with a weight of two or more dimensions.

    ``name``: what network files call it; ``other_names``: what those of other programs do. ``folder`` and ``path``: its
    place in a Diffusers folder, where its tensors are ``path.weight`` and perhaps ``path.bias``. ``block``: its block
    index in the U-Net, None in a text encoder.
    """

    name: str
    folder: str
    path: str
    other_names: tuple[str, ...] = ()
    block: int | None = None

    @property
    def part(self) -> Part:
        """Whether it belongs to a text encoder or to the U-Net."""
        return "unet" if self.folder == "unet" else "text_encoder"


def model_layers(spec: ArchitectureSpec) -> tuple[ModelLayer, ...]:
    """All layers that adapters may change, text encoders first, convolutions too."""
    prefixes = text_encoder_prefixes(len(spec.text_encoders))
    texts = [
        layer
        for folder, prefix, text in zip(spec.text_parts, prefixes, spec.text_encoders, strict=True)
        for layer in _text_layers(folder, prefix, text)
    ]
    return (*texts, *_unet_layers(spec))


def layout_of(spec: ArchitectureSpec) -> BlockLayout:
    """How the blocks of this architecture's U-Net are counted."""
    return layout_of_levels(len(spec.unet.widths))


def _text_layers(folder: str, prefix: str, text: TextEncoderSpec) -> list[ModelLayer]:
    paths = [f"text_model.encoder.layers.{index}.{part}" for index in range(text.layers) for part in TEXT_LAYER_PARTS]
    # Diffusers' files number only the second encoder
    others = ("lora_te",) if prefix == "lora_te1" else ()
    return [
        ModelLayer(
            text_encoder_name(prefix, path), folder, path, tuple(text_encoder_name(other, path) for other in others)
        )
        for path in paths
    ]


def _unet_layers(spec: ArchitectureSpec) -> list[ModelLayer]:
    by_file = spec.family == "sdxl"
    layout = layout_of(spec)
    found: list[ModelLayer] = []
    for path in layer_paths(spec.unet):
        if path.is_norm or not _IN_BLOCK.match(path.memory):
            continue
        own, others = (path.file, (unet_name(path.memory),)) if by_file else (path.memory, ())
        found.append(ModelLayer(unet_name(own), "unet", path.memory, others, block_of(own, layout)))
    return found
