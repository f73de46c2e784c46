"""The 25 blocks of an SD1/SD2 U-Net (IN00-IN11, M00, OUT00-OUT11) and the learning-rate factors of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

BLOCK_COUNT = 25
MIDDLE = 12
SIDE_COUNT = 12  # blocks of the down half, and of the up half

_PLACE = re.compile(
    r"(?P<side>down|up)_blocks[._](?P<level>\d+)[._](?:(?:resnets|attentions)[._](?P<index>\d+)|(?:down|up)samplers)"
)


def block_of(path: str) -> int | None:
    """Block index of a U-Net layer, from its path or its name in files; None outside the blocks."""
    if "mid_block" in path:
        return MIDDLE
    match = _PLACE.search(path)
    if match is None:
        return None
    # a level counts three places; its sampler stands at the last
    place = 3 * int(match["level"]) + (2 if match["index"] is None else int(match["index"]))
    return 1 + place if match["side"] == "down" else MIDDLE + 1 + place


_PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda t: math.sin(math.pi * t / 2),
    "cosine": lambda t: math.sin(math.pi * (1 - t) / 2),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}


def side_factors(text: str) -> tuple[float, ...]:
    """The 12 factors of one side: a list of 12, one number for all, or ``preset`` or ``preset+base``.

    Place j of 12 stands at t = j/11: for the down side 0 is the shallowest block, for the up side the deepest. An empty
    place in a list is 0. Raises ValueError with the reason.
    """
    if "," in text:
        values = tuple(_number(item) if item.strip() else 0.0 for item in text.split(","))
        if len(values) != SIDE_COUNT:
            raise ValueError(f"needs {SIDE_COUNT} numbers, has {len(values)}")
        return values
    name, plus, base = text.strip().partition("+")
    if name in _PRESETS:
        offset = _number(base) if plus else 0.0
        return tuple(_PRESETS[name](j / (SIDE_COUNT - 1)) + offset for j in range(SIDE_COUNT))
    try:
        return (_number(text),) * SIDE_COUNT
    except ValueError:
        known = ", ".join(_PRESETS)
        raise ValueError(
            f"must be {SIDE_COUNT} numbers, one number, or a preset ({known}), perhaps with +base"
        ) from None


@dataclass(frozen=True, slots=True)
class BlockFactors:
    """A learning-rate factor for each of the 25 blocks; 0 leaves a block out."""

    values: tuple[float, ...]

    def of(self, block: int | None) -> float:
        """The factor of a block; 1 for layers outside the blocks."""
        return 1.0 if block is None else self.values[block]


def block_factors(
    down: tuple[float, ...] | None, middle: float | None, up: tuple[float, ...] | None, zero_threshold: float = 0.0
) -> BlockFactors:
    """Factors of all blocks; what is not given is 1, and a factor at or below the threshold is 0.

    Block 0 is the first convolution, which no adapter touches; its place in ``down`` is there only for the count.
    """
    ones = (1.0,) * SIDE_COUNT
    values = (*(down or ones), 1.0 if middle is None else middle, *(up or ones))
    return BlockFactors(tuple(value if value > zero_threshold else 0.0 for value in values))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text.strip()!r} is no number") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text.strip()!r} must be 0 or more")
    return value
