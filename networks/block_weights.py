"""The blocks of a U-Net, numbered in the order of Stability files, and the learning-rate factors of each.

SD1/SD2 have 25 (IN00-IN11, M00, OUT00-OUT11), SDXL has 19 (input 0-8, middle, output 0-8).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How a U-Net's blocks are counted. ``side_count`` blocks each in the down half and in the up half."""

    title: str
    side_count: int

    @property
    def middle(self) -> int:
        """Index of the middle block."""
        return self.side_count

    @property
    def count(self) -> int:
        """Number of all blocks."""
        return 2 * self.side_count + 1


SD_BLOCKS = BlockLayout("SD1 and SD2", 12)
SDXL_BLOCKS = BlockLayout("SDXL", 9)


def layout_of_levels(levels: int) -> BlockLayout:
    """The count for a U-Net with this many levels, each of three blocks in either half."""
    return next((known for known in (SD_BLOCKS, SDXL_BLOCKS) if known.side_count == 3 * levels), SD_BLOCKS)


_FILE_PLACE = re.compile(r"(?P<side>input|output)_blocks[._](?P<index>\d+)(?:[._]|$)")
_PLACE = re.compile(
    r"(?P<side>down|up)_blocks[._](?P<level>\d+)[._](?:(?:resnets|attentions)[._](?P<index>\d+)|(?:down|up)samplers)"
)


def block_of(path: str, layout: BlockLayout = SD_BLOCKS) -> int | None:
    """Block index of a U-Net layer, from its path in memory or in files or from its name; None outside the blocks."""
    if "mid_block" in path or "middle_block" in path:
        return layout.middle
    match = _FILE_PLACE.search(path)
    if match is not None:
        return int(match["index"]) + (0 if match["side"] == "input" else layout.middle + 1)
    match = _PLACE.search(path)
    if match is None:
        return None
    # a level counts three places; its sampler stands at the last
    place = 3 * int(match["level"]) + (2 if match["index"] is None else int(match["index"]))
    return 1 + place if match["side"] == "down" else layout.middle + 1 + place


_PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda t: math.sin(math.pi * t / 2),
    "cosine": lambda t: math.sin(math.pi * (1 - t) / 2),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}


def side_factors(text: str, layout: BlockLayout = SD_BLOCKS) -> tuple[float, ...]:
    """The factors of one side: a list of all, one number for all, or ``preset`` or ``preset+base``.

    Place j of n stands at t = j/(n-1): for the down side 0 is the shallowest block, for the up side the deepest. An
    empty place in a list is 0. Raises ValueError with the reason.
    """
    count = layout.side_count
    if "," in text:
        values = tuple(_number(item) if item.strip() else 0.0 for item in text.split(","))
        if len(values) != count:
            raise ValueError(f"needs {count} numbers, has {len(values)} ({layout.title})")
        return values
    name, plus, base = text.strip().partition("+")
    if name in _PRESETS:
        offset = _number(base) if plus else 0.0
        return tuple(_PRESETS[name](j / (count - 1)) + offset for j in range(count))
    try:
        return (_number(text),) * count
    except ValueError:
        known = ", ".join(_PRESETS)
        raise ValueError(f"must be {count} numbers, one number, or a preset ({known}), perhaps with +base") from None


@dataclass(frozen=True, slots=True)
class BlockFactors:
    """A learning-rate factor for each block of the U-Net; 0 leaves a block out."""

    values: tuple[float, ...]

    def of(self, block: int | None) -> float:
        """The factor of a block; 1 for layers outside the blocks."""
        return 1.0 if block is None else self.values[block]


def block_factors(
    down: tuple[float, ...] | None,
    middle: float | None,
    up: tuple[float, ...] | None,
    zero_threshold: float = 0.0,
    layout: BlockLayout = SD_BLOCKS,
) -> BlockFactors:
    """Factors of all blocks; what is not given is 1, and a factor at or below the threshold is 0.

    Block 0 is the first convolution, which no adapter touches; its place in ``down`` is there only for the count.
    """
    ones = (1.0,) * layout.side_count
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
