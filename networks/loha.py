"""LoHa: the weight difference as a Hadamard product of two low-rank matrices, ΔW = alpha/rank · (A₁ B₁) ∘ (A₂ B₂).

Its rank is up to R², from as many parameters as LoRA of rank 2R. N. Hyeon-Woo et al., "FedPara: Low-Rank Hadamard
Product for Communication-Efficient Federated Learning", arXiv:2108.06098, section 2.1, eq. 1; for convolutions also in
Tucker form (proposition 3). Tensors, scale and start are those of LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts
from networks.dora import Decomposed
from networks.factory import NetworkFactory
from networks.lowrank import product_norm
from networks.network_args import Reader, truth
from networks.products import hadamard_factors, layer_shape_of, with_core
from networks.recompute import recomputed


class LohaAdapter(Adapter):
    """``A`` are ``hada_w1_a`` and ``hada_w2_a``, (O, R), ``B`` are ``hada_w1_b`` and ``hada_w2_b``, (R, I·K·K).

    In Tucker form they are (R, O) and (R, I), with the cores ``hada_t1`` and ``hada_t2``, (R, R, K, K), between them.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")
    optional_names: ClassVar[tuple[str, ...]] = ("hada_t1", "hada_t2")
    plus_names: ClassVar[tuple[str, ...]] = ("hada_w2_a",)
    arguments: ClassVar[Mapping[str, Reader]] = {"use_tucker": truth}

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        size: AdapterSize,
        multiplier: float = 1.0,
        dropouts: Dropouts = NO_DROPOUT,
        use_tucker: bool = False,
    ) -> None:
        super().__init__(name, layer, size, multiplier, dropouts)
        shape = tuple(cast(Tensor, layer.weight).shape)
        outputs, inputs, kernel, rank = shape[0], shape[1], shape[2:], size.rank
        self._has_core = use_tucker and kernel not in ((), (1, 1))
        flat = inputs if self._has_core else torch.Size(shape[1:]).numel()
        for number in (1, 2):
            up = torch.zeros((rank, outputs) if self._has_core else (outputs, rank))
            self.register_parameter(f"hada_w{number}_a", nn.Parameter(up))
            self.register_parameter(f"hada_w{number}_b", nn.Parameter(torch.zeros(rank, flat)))
        if self._has_core:
            self.hada_t1 = nn.Parameter(torch.zeros(rank, rank, *kernel))
            self.hada_t2 = nn.Parameter(torch.zeros(rank, rank, *kernel))
        flat_inputs = torch.Size(shape[1:]).numel()
        self._is_thin = rank**2 < min(outputs, flat_inputs)
        # two products of rank R² that need no more operations than one of the weight's size, and keep no more than x is
        is_cheap = rank**2 * (outputs + flat_inputs) <= outputs * flat_inputs
        self._acts_thin = is_cheap and rank**2 <= inputs

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        return tensors["hada_w1_b"].shape[0]

    @classmethod
    def layer_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        up, down, core = tensors["hada_w1_a"], tensors["hada_w1_b"], tensors.get("hada_t1")
        if core is not None:
            return (up.shape[1], down.shape[1], *core.shape[2:])
        return layer_shape_of(up.shape[0], down[0].numel())

    @classmethod
    def structure_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"use_tucker": True} if "hada_t1" in tensors else {}

    def start(self) -> None:
        spreads = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0, "hada_t1": 0.1, "hada_t2": 0.1}
        for name, std in spreads.items():
            if name in self._parameters:
                nn.init.normal_(self.get_parameter(name), std=std)

    def pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(A₁, B₁) and (A₂, B₂) as float32 matrices (O, R) and (R, I·K·K), without alpha."""
        return self._pair("1"), self._pair("2")

    def _pair(self, number: str) -> tuple[Tensor, Tensor]:
        named = cast(dict[str, Tensor], self._parameters)
        up, down = named[f"hada_w{number}_a"].float(), named[f"hada_w{number}_b"].float()
        return (up.T, with_core(named[f"hada_t{number}"].float(), down)) if self._has_core else (up, down)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if not self._is_thin:
            return None
        up_OQ, down_QI = hadamard_factors(*self.pairs())
        return up_OQ * self.scale, down_QI

    def delta_weight(self) -> Tensor:
        (up1, down1), (up2, down2) = self.pairs()
        product = ((up1 * self.scale) @ down1) * (up2 @ down2)
        return product.reshape(cast(Tensor, self.layer.weight).shape)

    def delta_norm(self) -> Tensor:
        factors = self.factors()
        return super().delta_norm() if factors is None else product_norm(*factors)

    @torch.no_grad()
    def scale_delta_(self, ratio: Tensor) -> None:
        for name in self.tensor_names[:4] if not self._has_core else ("hada_t1", "hada_t2"):
            self.get_parameter(name).mul_(ratio.sqrt() if self._has_core else ratio.sqrt().sqrt())

    def change(self, x: Tensor) -> Tensor:
        # this class's own product, whatever a class after it makes of it
        factors = LohaAdapter.factors(self) if self._acts_thin else None
        if factors is None:
            return self._thinned(recomputed(self._by_product, x, tuple(self.parameters())))
        up, down = (factor.to(x.dtype) for factor in factors)
        if not self._is_conv:
            return self._thinned(F.linear(F.linear(x, down), up))
        kernel = cast(Tensor, self.layer.weight).shape[1:]
        return self._thinned(F.conv2d(self._operate(x, down.view(-1, *kernel)), up[:, :, None, None]))

    def _by_product(self, x: Tensor) -> Tensor:
        return self._operate(x, LohaAdapter.delta_weight(self).to(x.dtype))


class DoraLoha(Decomposed, LohaAdapter):
    """LoHa with trained magnitudes (DoRA)."""

    tensor_names: ClassVar[tuple[str, ...]] = ("dora_scale", *LohaAdapter.tensor_names)
    arguments: ClassVar[Mapping[str, Reader]] = {**LohaAdapter.arguments, **Decomposed.arguments}


_FACTORY = NetworkFactory("networks.loha", LohaAdapter, {"dora_wd": DoraLoha})
create_network = _FACTORY.create_network
create_network_from_weights = _FACTORY.create_network_from_weights
reads, inspect_weights = _FACTORY.reads, _FACTORY.inspect_weights
