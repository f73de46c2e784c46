"""OFT: the outputs of a layer are turned by a trained rotation, W' = Rᵀ W and b' = Rᵀ b.

R is made of b equal blocks on the diagonal, each the Cayley transform R = (I + Q)(I - Q)⁻¹ of a skew Q = A - Aᵀ, so the
angles between what a layer's outputs stand for are kept. Z. Qiu et al., "Controlling Text-to-Image Diffusion by
Orthogonal Finetuning", arXiv:2306.07280. Alpha limits how far it turns: the norm of Q over all blocks is at most
alpha · O (constrained OFT; 0: no limit). Only for the U-Net.

Shape legend: G diagonal blocks, S side of a block, O = G·S output width, N rows.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.log import UserError
from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts, bias_of, weight_of
from networks.factory import NetworkFactory
from networks.network_args import NetworkArgs
from networks.targets import Target, TextEncoders, unet_targets

logger = logging.getLogger(__name__)

_IN_ATTENTION = re.compile(r"\.attn[12]\.")


def rotation_change(blocks_GSS: Tensor, limit: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """R - I of every block, (G, S, S), computed in float32; exactly zero if the blocks are. ``limit`` 0: none.

    (I + Q)(I - Q)⁻¹ - I = (I - Q)⁻¹ 2Q: a linear system, which always has a solution as Q is skew.
    """
    return cast(Tensor, _RotationChange.apply(blocks_GSS, limit, dtype))


class _RotationChange(torch.autograd.Function):
    """C = R - I. With M = (I - Q)⁻¹ it is 2(M - I), so dC = 2 M dQ M where M = I + C/2.

    The result is all that is kept for the backward pass; autograd would keep the factors of the solution too.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, limit: float, dtype: torch.dtype) -> Tensor:  # pyright: ignore
        skew_GSS = _skew(blocks)
        if limit > 0:
            skew_GSS = skew_GSS * (limit / skew_GSS.norm().clamp(min=limit))
        identity = torch.eye(skew_GSS.shape[-1], device=skew_GSS.device)
        change_GSS = torch.linalg.solve(identity - skew_GSS, 2 * skew_GSS).to(dtype)
        ctx.save_for_backward(blocks, change_GSS)
        ctx.limit = limit
        return change_GSS

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        blocks, change_GSS = ctx.saved_tensors
        inverse_GSS = change_GSS.float() / 2 + torch.eye(change_GSS.shape[-1], device=change_GSS.device)
        of_skew = 2 * inverse_GSS.mT @ grad.float() @ inverse_GSS.mT
        if ctx.limit > 0:  # beyond the limit only the direction of the skew matters
            skew_GSS = _skew(blocks)
            norm = skew_GSS.norm()
            bounded = norm.clamp(min=ctx.limit)
            along = (of_skew * skew_GSS).sum() / bounded.square() * (norm > ctx.limit)
            of_skew = (of_skew - along * skew_GSS) * (ctx.limit / bounded)
        return (of_skew - of_skew.mT).to(blocks.dtype), None, None


def _skew(blocks_GSS: Tensor) -> Tensor:
    return blocks_GSS.float() - blocks_GSS.float().mT


class OftAdapter(Adapter):
    """``y + multiplier · y (R - I)``; ``rank`` is the number of blocks. Between 0 and 1 it is a blend, no rotation."""

    tensor_names: ClassVar[tuple[str, ...]] = ("oft_blocks", "alpha")
    prefix: ClassVar[str] = "oft"
    needs_weight: ClassVar[bool] = True
    alpha_scales: ClassVar[bool] = False

    def __init__(
        self, name: str, layer: nn.Module, size: AdapterSize, multiplier: float = 1.0, dropouts: Dropouts = NO_DROPOUT
    ) -> None:
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"{name}: OFT adapts Linear and Conv2d layers, not {type(layer).__name__}")
        super().__init__(name, layer, size, multiplier, dropouts)
        width = _width(layer)
        if width % size.rank:
            raise ValueError(f"{name}: {width} outputs cannot be divided into {size.rank} blocks")
        side = width // size.rank
        # blocks are large: on a model without weights, for a plan, they take no memory either
        place = torch.device("meta") if weight_of(layer).is_meta else None
        self.oft_blocks = nn.Parameter(torch.zeros(size.rank, side, side, device=place))

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        blocks = tensors["oft_blocks"]
        if blocks.dim() != 3:
            raise UserError("the file holds butterfly rotations (BOFT), use --network_module lycoris.kohya for it")
        return blocks.shape[0]

    @classmethod
    def layer_shape(cls, tensors: Mapping[str, Tensor]) -> None:
        return None

    def start(self) -> None:
        nn.init.zeros_(self.oft_blocks)

    def alpha_if_zero(self) -> float:
        return 0.0

    def refresh(self) -> None:
        super().refresh()
        self._limit = float(self.alpha) * _width(self.layer)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def train(self, mode: bool = True) -> OftAdapter:
        self._kept = None
        return super().train(mode)

    def rotation(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """R - I, (G, S, S); outside training it is computed once for the same blocks."""
        blocks = self.oft_blocks
        if self.training or (blocks.requires_grad and torch.is_grad_enabled()):
            return rotation_change(blocks, self._limit, dtype)
        state = blocks.data_ptr(), blocks._version, blocks.device, dtype  # pyright: ignore[reportPrivateUsage]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, rotation_change(blocks, self._limit, dtype)
        return self._kept[1]

    def delta_weight(self) -> Tensor:
        weight = weight_of(self.layer).float()
        change_GSS = self.rotation()
        rows_GSI = weight.reshape(self.rank, change_GSS.shape[-1], -1)
        return torch.bmm(change_GSS.mT, rows_GSI).view(weight.shape)

    def delta_bias(self) -> Tensor | None:
        bias = bias_of(self.layer)
        return None if bias is None else self.turned(bias.float()[None], is_conv=False)[0]

    def combine(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self.turned(y, self._is_conv) * self._strength()

    def turned(self, y: Tensor, is_conv: bool) -> Tensor:
        """y (R - I) over the outputs of ``y``, (..., O) or (B, O, H, W), block by block."""
        change_GSS = self.rotation(y.dtype)
        side = change_GSS.shape[-1]
        if is_conv:
            parts = y.reshape(y.shape[0], self.rank, side, -1)
            return torch.matmul(change_GSS.mT, parts).view(y.shape)
        rows_GNS = y.reshape(-1, self.rank, side).transpose(0, 1)
        return torch.bmm(rows_GNS, change_GSS).transpose(0, 1).reshape(y.shape)


class OftLycorisAdapter(OftAdapter):
    """The same as LyCORIS has it (``algo=diag-oft``): the bias is not turned, and outputs may be scaled each.

    W' = rescale · Rᵀ W. Its tensors have the names of OFT, its modules the prefix of LoRA.
    """

    optional_names: ClassVar[tuple[str, ...]] = ("rescale",)
    prefix: ClassVar[str] = "lora"

    rescale: nn.Parameter | None

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        size: AdapterSize,
        multiplier: float = 1.0,
        dropouts: Dropouts = NO_DROPOUT,
        rescaled: bool = False,
    ) -> None:
        super().__init__(name, layer, size, multiplier, dropouts)
        shape = (_width(layer), *(1,) * (weight_of(layer).dim() - 1))
        self.register_parameter("rescale", nn.Parameter(torch.ones(shape)) if rescaled else None)

    @classmethod
    def structure_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"rescaled": "rescale" in tensors}

    def delta_weight(self) -> Tensor:
        delta = super().delta_weight()
        if self.rescale is None:
            return delta
        weight, rescale = weight_of(self.layer).float(), self.rescale.float()
        return rescale * delta + (rescale - 1) * weight

    def delta_bias(self) -> Tensor | None:
        return None

    def combine(self, y: Tensor, x: Tensor) -> Tensor:
        spread = (-1, 1, 1) if self._is_conv else (-1,)
        bias = bias_of(self.layer)
        plain = y if bias is None else y - bias.to(y.dtype).view(spread)
        delta = self.turned(plain, self._is_conv)
        if self.rescale is not None:
            rescale = self.rescale.to(y.dtype).view(spread)
            delta = rescale * delta + (rescale - 1) * plain
        return y + delta * self._strength()


def _width(layer: nn.Module) -> int:
    return weight_of(layer).shape[0]


class _OftFactory(NetworkFactory):
    """``network_dim`` is the number of blocks of every layer, ``network_alpha`` the limit."""

    flags: ClassVar[tuple[str, ...]] = ("enable_all_linear", "enable_conv")

    def targets(self, text_encoder: TextEncoders, unet: nn.Module, args: NetworkArgs) -> Sequence[Target]:
        """The attention layers of the U-Net; with the arguments all of its transformers, and all outside them."""
        inside = unet_targets(unet, with_convolutions=False)
        chosen = {t.name for t in inside if "enable_all_linear" in args.flags or _IN_ATTENTION.search(t.path)}
        if "enable_conv" not in args.flags:
            return [target for target in inside if target.name in chosen]
        left = {target.name for target in inside} - chosen
        return [target for target in unet_targets(unet, with_convolutions=True) if target.name not in left]

    def sizes(self, args: NetworkArgs, plain: AdapterSize) -> Callable[[Target], AdapterSize | None]:
        if args.with_convolutions or args.conv_alpha is not None:
            raise UserError(
                "--network_args conv_*: networks.oft has one size for all; enable_conv=True adds 3x3 layers"
            )
        ranks, alphas, factors = args.block_dims, args.block_alphas, args.block_factors

        def size_of(target: Target) -> AdapterSize | None:
            block = target.block
            if block is None or (factors is not None and factors.of(block) == 0):
                return None
            rank = ranks[block] if ranks else plain.rank
            return AdapterSize(rank, alphas[block] if alphas else plain.alpha) if rank else None

        return size_of

    def require_sizes(self, sizes: Mapping[Target, AdapterSize], args: NetworkArgs) -> None:
        wrong = [target for target, size in sizes.items() if _width(target.layer) % size.rank]
        if not wrong:
            return
        rank = sizes[wrong[0]].rank
        common = math.gcd(*(_width(target.layer) for target, size in sizes.items() if size.rank == rank))
        good = [number for number in range(1, common + 1) if common % number == 0]
        near = sorted({max(n for n in good if n < rank), min((n for n in good if n > rank), default=common)})
        raise UserError(
            f"networks.oft: {len(wrong)} layers cannot be divided into {rank} blocks (--network_dim), first "
            f"{wrong[0].name} with {_width(wrong[0].layer)} outputs; {' or '.join(map(str, near))} divides all"
        )

    def dropouts(self, args: NetworkArgs, neuron_dropout: float | None) -> Dropouts:
        dropouts = super().dropouts(args, neuron_dropout)
        if dropouts.neuron or dropouts.rank:
            logger.warning("networks.oft has no ranks to drop: of the dropouts only module_dropout acts")
        return dropouts

    def inspect_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        found = {key.partition(".")[0]: blocks for key, blocks in tensors.items() if key.endswith(".oft_blocks")}
        norms: dict[str, float] = {}
        for module, blocks in found.items():
            alpha = float(tensors.get(f"{module}.alpha", 0.0))
            norms[module] = float(rotation_change(blocks, alpha * blocks.shape[0] * blocks.shape[1]).norm())
        return norms

    def change_title(self) -> str:
        return "how far outputs are turned, norm of R - I,"


_FACTORY = _OftFactory("networks.oft", OftAdapter)
create_network = _FACTORY.create_network
create_network_from_weights = _FACTORY.create_network_from_weights
reads, inspect_weights, change_title = _FACTORY.reads, _FACTORY.inspect_weights, _FACTORY.change_title
