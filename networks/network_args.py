"""Typed reading of ``--network_args``: unknown keys, wrong types and impossible values are listed all at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from library.log import UserError, nearest
from networks.block_weights import SD_BLOCKS, BlockFactors, BlockLayout, block_factors, side_factors

logger = logging.getLogger(__name__)

Reader = Callable[[str], Any]


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None
    if value < 0:
        raise ValueError("must be 0 or more")
    return value


def number(text: str) -> float:
    """A number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError("must be 0 or more")
    return value


def rate(text: str) -> float:
    """A probability, less than 1."""
    value = number(text)
    if value >= 1:
        raise ValueError("must be 0 or more and less than 1")
    return value


def ratio(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if value == 0:
        raise ValueError("must be above 0")
    return value


def truth(text: str) -> bool:
    """Yes or no."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError("must be True or False")
    return words[text.lower()]


def per_block(read: Reader, layout: BlockLayout) -> Reader:
    """Values separated by commas, one for each block of the U-Net, or a single value for all of them."""

    def read_list(text: str) -> tuple[Any, ...]:
        values = tuple(read(item.strip()) for item in text.split(","))
        if len(values) == 1:
            return values * layout.count
        if len(values) != layout.count:
            last = layout.side_count - 1
            raise ValueError(
                f"needs {layout.count} values, has {len(values)} "
                f"({layout.title}: input blocks 0-{last}, middle, output blocks 0-{last})"
            )
        return values

    return read_list


def read_network_args(
    given: Mapping[str, object], readers: Mapping[str, Reader], module: str, option: str = "--network_args"
) -> dict[str, Any]:
    """Values of the arguments that were given; None and empty text count as not given. ``option``: where they stand.

    Raises UserError that lists all unknown keys (with the nearest name) and all bad values.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, raw in given.items():
        text = "" if raw is None else str(raw).strip()
        if key not in readers:
            hint = nearest(key, readers) or f"; it knows {', '.join(sorted(readers))}"
            problems.append(f"{option} {key}: {module} has no such argument{hint}")
        elif text not in ("", "None"):
            try:
                values[key] = readers[key](text)
            except ValueError as error:
                problems.append(f"{option} {key}={text}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return values


@dataclass(frozen=True, slots=True)
class PlusRatios:
    """LoRA+: how many times the rate of the other tensors is that of the tensors that start at zero.

    S. Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354: a ratio above 1 lets both
    factors of a product learn equally well.
    """

    text_encoder: float = 1.0
    unet: float = 1.0


@dataclass(frozen=True, kw_only=True)
class NetworkArgs:
    """The arguments of a network module; None means not given.

    ``flags``: variants that are switched on; ``own``: arguments that only this type of adapter has.
    """

    conv_dim: int | None = None
    conv_alpha: float | None = None
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: tuple[float, ...] | None = None
    mid_lr_weight: float | None = None
    up_lr_weight: tuple[float, ...] | None = None
    block_lr_zero_threshold: float = 0.0
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    flags: frozenset[str] = frozenset()
    own: Mapping[str, Any] = field(default_factory=dict)
    layout: BlockLayout = SD_BLOCKS

    @property
    def with_convolutions(self) -> bool:
        """True if layers outside the transformers get an adapter too (LoRA-C3Lier)."""
        return bool(self.conv_dim) or self.conv_block_dims is not None

    @property
    def block_factors(self) -> BlockFactors | None:
        """Learning-rate factors of the blocks; None if no ``*_lr_weight`` was given."""
        if self.down_lr_weight is None and self.mid_lr_weight is None and self.up_lr_weight is None:
            return None
        sides = self.down_lr_weight, self.mid_lr_weight, self.up_lr_weight
        return block_factors(*sides, self.block_lr_zero_threshold, self.layout)

    @property
    def plus_ratios(self) -> PlusRatios:
        """Ratios of LoRA+; those of the parts win over that of all."""
        ratios = (self.loraplus_text_encoder_lr_ratio, self.loraplus_unet_lr_ratio)
        return PlusRatios(*(given or self.loraplus_lr_ratio or 1.0 for given in ratios))

    def sizes_given(self) -> list[str]:
        """Names of the given arguments that decide ranks and alphas."""
        return [f.name for f in fields(self) if f.name in _SIZE_ARGS and getattr(self, f.name) is not None]


_SIZE_ARGS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


def _lora_readers(layout: BlockLayout) -> dict[str, Reader]:
    def side(text: str) -> tuple[float, ...]:
        return side_factors(text, layout)

    return {
        "conv_dim": whole,
        "conv_alpha": number,
        "dropout": rate,
        "rank_dropout": rate,
        "module_dropout": rate,
        "block_dims": per_block(whole, layout),
        "block_alphas": per_block(number, layout),
        "conv_block_dims": per_block(whole, layout),
        "conv_block_alphas": per_block(number, layout),
        "down_lr_weight": side,
        "mid_lr_weight": number,
        "up_lr_weight": side,
        "block_lr_zero_threshold": number,
        "loraplus_lr_ratio": ratio,
        "loraplus_unet_lr_ratio": ratio,
        "loraplus_text_encoder_lr_ratio": ratio,
    }


def read_lora_args(
    given: Mapping[str, object],
    module: str = "networks.lora",
    layout: BlockLayout = SD_BLOCKS,
    flags: Mapping[str, Reader] | None = None,
    own: Mapping[str, Reader] | None = None,
) -> NetworkArgs:
    """The arguments of ``networks.lora`` for a U-Net with these blocks, and those of one type of adapter.

    Raises UserError that lists every problem.
    """
    flags, own = flags or {}, own or {}
    values = read_network_args(given, {**_lora_readers(layout), **flags, **own}, module)
    args = NetworkArgs(
        **{name: value for name, value in values.items() if name not in flags and name not in own},
        flags=frozenset(name for name in flags if values.get(name)),
        own={name: values[name] for name in own if name in values},
        layout=layout,
    )
    unused = [name for name in ("conv_alpha", "conv_block_alphas") if getattr(args, name) is not None]
    if unused and not args.with_convolutions:
        logger.warning("--network_args %s has no effect without conv_dim or conv_block_dims", " and ".join(unused))
    return args
