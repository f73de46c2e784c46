"""Key table of ControlNet files (L. Zhang and others, arXiv:2302.05543): the U-Net's encoder under the U-Net's names,
the block that reads the guide picture, and the convolutions that begin at zero.

Left: names in an original single file, below ``control_model.`` or below nothing. Right: names of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from library.checkpoint.keymap import KeyMap, Operation, Row
from library.checkpoint.sd_keys import Pair, unet_rows
from library.models.spec import UNetSpec

CONTROL_PREFIX = "control_model."
DIFFERENCE = "difference"
"""A tensor of this name says that the encoder of a file is to be added to that of the model it is used with."""
PART = "controlnet"
HINT_CONVOLUTIONS = 8
_ENCODER = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
_HINT = "input_hint_block."
_ZERO = "zero_convs."
_IGNORABLE = r"^(difference|global_step|epoch)$|position_ids$"


def encoder_rows(spec: UNetSpec) -> Iterator[Pair]:
    """What a ControlNet has in common with the U-Net: the embeddings, the down blocks, the middle block."""
    return (pair for pair in unet_rows(spec) if pair[0].startswith(_ENCODER))


def control_rows(spec: UNetSpec) -> Iterator[Pair]:
    """All names of a ControlNet for a U-Net, without a prefix."""
    yield from encoder_rows(spec)
    hint = ("conv_in", *(f"blocks.{index}" for index in range(HINT_CONVOLUTIONS - 2)), "conv_out")
    for index, name in enumerate(hint):
        yield from _layer(f"{_HINT}{2 * index}", f"controlnet_cond_embedding.{name}")
    for index in range(skip_count(spec)):
        yield from _layer(f"{_ZERO}{index}.0", f"controlnet_down_blocks.{index}")
    yield from _layer("middle_block_out.0", "controlnet_mid_block")


def skip_count(spec: UNetSpec) -> int:
    """How many skip connections the encoder has: the first convolution, the layers, the downsamplers."""
    return len(spec.widths) * (spec.layers_per_level + 1)


def _layer(file: str, canonical: str) -> Iterator[Pair]:
    for kind in ("weight", "bias"):
        yield f"{file}.{kind}", f"{canonical}.{kind}", Operation.COPY


def key_map(spec: UNetSpec, prefix: str = CONTROL_PREFIX) -> KeyMap:
    """The table of an original file with this prefix."""
    rows = tuple(Row(prefix + file_key, PART, key, how) for file_key, key, how in control_rows(spec))
    starts = (prefix,) if prefix else (*_ENCODER, _HINT, _ZERO, "middle_block_out.")
    return KeyMap(rows, starts, re.compile(_IGNORABLE))


def prefix_of(file_keys: Iterable[str]) -> str | None:
    """``control_model.`` or nothing, as the keys of an original file begin; None for another kind of file."""
    keys = set(file_keys)
    marker = f"{_HINT}0.weight"
    return next((prefix for prefix in (CONTROL_PREFIX, "") if prefix + marker in keys), None)
