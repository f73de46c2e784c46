"""DyLoRA: a LoRA of which every prefix of ranks works alone, so that the rank may be chosen after the training.

For each step and layer a rank t is drawn, a multiple of ``unit``, and only the first t ranks take part,
ΔW_t = alpha/rank · U[:, :t] · D[:t]; of these the last ``unit`` learn, the others stay as they are ("frozen" in the
paper). The first ranks therefore carry most. M. Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pretrained
Models using Dynamic Search-Free Low-Rank Adaptation", arXiv:2210.07558, algorithm 1. Files are those of LoRA; the first
t ranks with alpha · t / rank are a LoRA of the strength that was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.log import UserError
from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts
from networks.factory import NetworkFactory
from networks.lora import LoraAdapter
from networks.network_args import NetworkArgs, Reader, whole
from networks.targets import Target


def _unit(text: str) -> int:
    if whole(text) == 0:
        raise ValueError("must be 1 or more")
    return whole(text)


class DyloraAdapter(LoraAdapter):
    """``y + factor · up[:, :t](down[:t](x))``; outside training, and before the first step, t is the whole rank."""

    has_own_files: ClassVar[bool] = False
    optional_names: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[Mapping[str, Reader]] = {"unit": _unit}

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        size: AdapterSize,
        multiplier: float = 1.0,
        dropouts: Dropouts = NO_DROPOUT,
        unit: int = 1,
    ) -> None:
        super().__init__(name, layer, size, multiplier, dropouts)
        self.active: int | None = None
        self.set_unit(unit)

    def set_unit(self, unit: int) -> None:
        """How many ranks learn together. Raises UserError if the rank is no multiple of it."""
        if self.rank % unit:
            raise UserError(_no_multiple(self.name, self.rank, unit))
        self.unit = unit

    def on_step(self) -> None:
        """Draw the number of ranks that take part, from torch's default generator: it is seeded for each step."""
        self.active = self.unit * (1 + int(torch.randint(self.rank // self.unit, ())))

    def _add(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        active = self.active
        if active is None or not self.training:
            return super()._add(y, x, down, up)
        first = active - self.unit
        prefixes = (_Prefix.apply(factor, dim, first, active) for factor, dim in ((down, 0), (up, 1)))
        return super()._add(y, x, *cast(tuple[Tensor, Tensor], tuple(prefixes)))


class _Prefix(torch.autograd.Function):
    """The first ``stop`` rows (dim 0) or columns (dim 1), of which only those from ``first`` on get a gradient."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, first: int, stop: int) -> Tensor:  # pyright: ignore
        ctx.place, ctx.shape = (dim, first, stop - first), whole.shape
        return whole.narrow(dim, 0, stop)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        of_whole = grad.new_zeros(ctx.shape)
        of_whole.narrow(*ctx.place).copy_(grad.narrow(*ctx.place))
        return of_whole, None, None, None


def _no_multiple(name: str, rank: int, unit: int) -> str:
    below = rank // unit * unit
    near = f"{below} or {below + unit}" if below else f"{unit}"
    return f"networks.dylora: the rank must be a multiple of unit={unit}, {name} has {rank}; {near} would do"


class _DyloraFactory(NetworkFactory):
    def require_sizes(self, sizes: Mapping[Target, AdapterSize], args: NetworkArgs) -> None:
        unit = args.own.get("unit", 1)
        for target, size in sizes.items():
            if size.rank % unit:
                raise UserError(_no_multiple(target.name, size.rank, unit))

    def prepare_restored(self, adapter: Adapter, args: NetworkArgs) -> None:
        if isinstance(adapter, DyloraAdapter):
            adapter.set_unit(args.own.get("unit", 1))


_FACTORY = _DyloraFactory("networks.dylora", DyloraAdapter)
create_network = _FACTORY.create_network
create_network_from_weights = _FACTORY.create_network_from_weights
reads, inspect_weights = _FACTORY.reads, _FACTORY.inspect_weights
