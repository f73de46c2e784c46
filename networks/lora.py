"""LoRA: the weight difference of a layer as a product of two thin matrices, ΔW = alpha/rank · up · down.

LoRA-LierLa adapts Linear layers and 1x1 convolutions; LoRA-C3Lier (with ``conv_dim``) also 3x3 convolutions and
the rest of the U-Net's blocks. E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
section 4.1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.log import UserError
from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts, Factor
from networks.lowrank import product_norm
from networks.network import AdapterNetwork, build_network
from networks.network_args import LoraArgs, read_lora_args
from networks.strengths import ARGUMENTS, PartStrengths, read_strengths
from networks.targets import Target, TextEncoders, block_layout, find_targets
from networks.weights import WeightTable, read_weights, to_weight_table

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4


class LoraAdapter(Adapter):
    """``y + factor · up(down(x))``; ``down`` starts as noise and ``up`` as zero, so a new adapter changes nothing.

    The factors may have another type than layer and activations: they are cast, which is cheap since they are small.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("alpha", "lora_down.weight", "lora_up.weight")

    def __init__(
        self, name: str, layer: nn.Module, size: AdapterSize, multiplier: float = 1.0, dropouts: Dropouts = NO_DROPOUT
    ) -> None:
        super().__init__(name, layer, size, multiplier, dropouts)
        if isinstance(layer, nn.Conv2d):
            self.lora_down = Factor(size.rank, layer.in_channels, *layer.kernel_size)
            self.lora_up = Factor(layer.out_channels, size.rank, 1, 1)
        elif isinstance(layer, nn.Linear):
            self.lora_down = Factor(size.rank, layer.in_features)
            self.lora_up = Factor(layer.out_features, size.rank)
        else:
            raise TypeError(f"{name}: LoRA adapts Linear and Conv2d layers, not {type(layer).__name__}")
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))  # uniform within ±1/sqrt(fan_in)
        self._is_conv = isinstance(layer, nn.Conv2d)
        # read from these in the forward pass: nn.Module's attribute access is slow, and parameters may be replaced
        self._down, self._up = self.lora_down.slot, self.lora_up.slot

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors["lora_down.weight"].shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Both factors as matrices (O, R) and (R, I·K·K)."""
        return self.lora_up.weight.flatten(1), self.lora_down.weight.flatten(1)

    def delta_weight(self) -> Tensor:
        up_OR, down_RI = self.matrices()
        product = (up_OR.float() @ down_RI.float()) * self.scale
        return product.view(self.layer.weight.shape)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def delta_norm(self) -> Tensor:
        return product_norm(*self.matrices()) * abs(self.scale)

    @torch.no_grad()
    def scale_delta_(self, ratio: Tensor) -> None:
        root = ratio.sqrt()
        self.lora_up.weight.mul_(root)
        self.lora_down.weight.mul_(root)

    def combine(self, y: Tensor, x: Tensor) -> Tensor:
        down, up = self._down["weight"], self._up["weight"]
        assert down is not None
        assert up is not None
        is_dropping = self.training and self.dropouts is not NO_DROPOUT
        if not (self._is_conv or is_dropping):
            rows_NO, rows_NI = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            return cast(Tensor, _AddLowRank.apply(rows_NO, rows_NI, down, up, self.factor)).view(y.shape)
        if down.dtype is not y.dtype:
            down, up = down.to(y.dtype), up.to(y.dtype)
        hidden = self._operate(x, down)
        hidden = self._dropped(hidden) if is_dropping else hidden * self.factor
        return y + (F.conv2d(hidden, up) if self._is_conv else F.linear(hidden, up))

    def _dropped(self, hidden: Tensor) -> Tensor:
        """Rank activations, (B, ..., R) or (B, R, H, W), after the dropouts and times the strength."""
        factor = 0.0 if self.is_skipped else self.factor  # zero, not absent: every process has every gradient
        if self.dropouts.neuron:
            hidden = F.dropout(hidden, self.dropouts.neuron)
        if self.dropouts.rank:
            kept_BR = torch.rand(hidden.shape[0], self.rank, device=hidden.device) > self.dropouts.rank
            spread = (-1, self.rank, 1, 1) if self._is_conv else (-1, *(1,) * (hidden.dim() - 2), self.rank)
            hidden = hidden * kept_BR.view(spread)
            factor /= 1.0 - self.dropouts.rank
        return hidden * factor


class _AddLowRank(torch.autograd.Function):
    """y (N, O) + factor · up · down · x (N, I), one fused product, scale and sum.

    Factors of another type than ``y`` are cast once more in the backward pass: autograd would keep the cast copies of
    all adapters until then, with float32 factors half of what the whole network takes.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: float) -> Tensor:  # pyright: ignore
        hidden_NR = F.linear(x, down.to(y.dtype))
        ctx.save_for_backward(x, hidden_NR, down, up)
        ctx.factor = factor
        return torch.addmm(y, hidden_NR, up.to(y.dtype).t(), alpha=factor)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, hidden_NR, down, up = ctx.saved_tensors
        of_hidden_NR = (grad_NO @ up.to(grad_NO.dtype)).mul_(ctx.factor)
        of_x = of_hidden_NR @ down.to(grad_NO.dtype) if ctx.needs_input_grad[1] else None
        of_up = (grad_NO.t() @ hidden_NR).mul_(ctx.factor) if ctx.needs_input_grad[3] else None
        of_down = of_hidden_NR.t() @ x if ctx.needs_input_grad[2] else None
        return grad_NO, of_x, of_down, of_up, None


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: object,
) -> AdapterNetwork:
    """A new network (the plug-in protocol's factory). It changes nothing until `AdapterNetwork.apply_to` and training.

    ``network_dim`` absent: rank 4; ``network_alpha`` absent: 1, and 0: the rank. ``network_args``: see
    docs/networks.md. Raises UserError for arguments that cannot be.
    """
    args = read_lora_args(network_args, layout=block_layout(unet))
    rank = network_dim or DEFAULT_RANK
    alpha = 1.0 if network_alpha is None else network_alpha
    return build_network(
        LoraAdapter,
        find_targets(text_encoder, unet, args.with_convolutions),
        size_of=_sizes_from_args(args, AdapterSize(rank, alpha)),
        multiplier=multiplier,
        dropouts=_dropouts(args, neuron_dropout),
        factors=args.block_factors,
    )


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: object,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """A network with the layers, ranks and alphas of a file (or of ``weights_sd``), and the file's tensors.

    The tensors are not loaded yet: `load_weights` after `apply_to`, or `merge_to`, does that. Dropouts and block
    learning-rate factors are taken from the arguments. Raises UserError if the file has layers that the model lacks;
    ``for_inference``: only if it has no other ones, and the arguments may say how strong it is in the model's parts.
    """
    layout, strengths = block_layout(unet), PartStrengths()
    if for_inference:
        strengths = read_strengths(network_args, layout, "networks.lora")
        network_args = {key: value for key, value in network_args.items() if key not in ARGUMENTS}
    args = read_lora_args(network_args, layout=layout)
    if args.sizes_given():
        logger.warning("--network_args %s: the file decides ranks and alphas", ", ".join(args.sizes_given()))
    source = file or "the given weights"
    if weights_sd is not None:
        table = to_weight_table(weights_sd, LoraAdapter.tensor_names, source)
    elif file is not None:
        table = read_weights(file, LoraAdapter.tensor_names)
    else:
        raise UserError("a network from weights needs a file")
    targets = find_targets(text_encoder, unet, with_convolutions=True)
    table = table.named_for(targets)
    network = build_network(
        LoraAdapter,
        targets,
        size_of=_sizes_from_table(table),
        multiplier=multiplier,
        dropouts=NO_DROPOUT if for_inference else _dropouts(args, neuron_dropout),
        factors=args.block_factors,
        strengths=strengths,
    )
    if for_inference:
        table = network.keep_known(table)
    else:
        network.require_known(table)
    return network, table.flat()


def _dropouts(args: LoraArgs, neuron_dropout: float | None) -> Dropouts:
    neuron = args.dropout if neuron_dropout is None else neuron_dropout
    dropouts = Dropouts(neuron or 0.0, args.rank_dropout or 0.0, args.module_dropout or 0.0)
    return NO_DROPOUT if dropouts == NO_DROPOUT else dropouts


def _sizes_from_table(table: WeightTable) -> Callable[[Target], AdapterSize | None]:
    def size_of(target: Target) -> AdapterSize | None:
        tensors = table.modules.get(target.name)
        return None if tensors is None else LoraAdapter.size_of(tensors)

    return size_of


def _sizes_from_args(args: LoraArgs, plain: AdapterSize) -> Callable[[Target], AdapterSize | None]:
    """Rank and alpha per layer: 3x3 convolutions take the ``conv_*`` arguments, U-Net layers their block's."""
    spatial_rank, spatial_alpha = args.conv_dim or 0, 1.0 if args.conv_alpha is None else args.conv_alpha
    factors = args.block_factors

    def size_of(target: Target) -> AdapterSize | None:
        block = target.block
        if target.is_spatial:
            ranks, alphas, rank, alpha = args.conv_block_dims, args.conv_block_alphas, spatial_rank, spatial_alpha
        else:
            ranks, alphas, rank, alpha = args.block_dims, args.block_alphas, plain.rank, plain.alpha
        if block is not None:
            if factors is not None and factors.of(block) == 0:
                return None
            rank = ranks[block] if ranks else rank
            alpha = alphas[block] if alphas else alpha
        return AdapterSize(rank, alpha) if rank else None

    return size_of
