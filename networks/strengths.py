"""How strong a network is in the parts and blocks of a model, when it is used and not trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from networks.block_weights import BlockLayout
from networks.network_args import per_block, read_network_args
from networks.targets import Part

ARGUMENTS = ("text_encoder_mul", "unet_mul", "block_mul")


class Place(Protocol):
    """Where in a model a layer stands."""

    @property
    def part(self) -> Part:
        """Text encoder or U-Net."""
        ...

    @property
    def block(self) -> int | None:
        """Block index in the U-Net."""
        ...


@dataclass(frozen=True)
class PartStrengths:
    """Factors of a network's multiplier: for the text encoders, for the U-Net, and for each block of the U-Net."""

    text_encoder_mul: float = 1.0
    unet_mul: float = 1.0
    block_mul: tuple[float, ...] | None = None

    def of(self, place: Place) -> float:
        """The factor for one layer."""
        if place.part == "text_encoder":
            return self.text_encoder_mul
        in_block = 1.0 if self.block_mul is None or place.block is None else self.block_mul[place.block]
        return self.unet_mul * in_block


def read_strengths(
    given: Mapping[str, object], layout: BlockLayout, module: str, option: str = "--network_args"
) -> PartStrengths:
    """Those arguments of a network that are strengths; the others are left alone. Raises UserError."""
    readers = {"text_encoder_mul": _signed, "unet_mul": _signed, "block_mul": per_block(_signed, layout)}
    own = {key: value for key, value in given.items() if key in ARGUMENTS}
    return PartStrengths(**read_network_args(own, readers, module, option))


def _signed(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value
