"""LoKr: the weight difference as a Kronecker product of a small and a larger block, ΔW = scale · C ⊗ B.

C is (a, c) and B is (b, d·K·K) for a layer of a·b outputs and c·d inputs; either may be a product of two thin matrices
of rank R. S.-Y. Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv:2309.14859, section 3.3. Tensors, sizes, scale and start are those of LyCORIS: scale is alpha/rank, but 1 if both
blocks are whole.

The product is never formed: with x as a matrix (c, d), (C ⊗ B) x = C x Bᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts
from networks.dora import Decomposed
from networks.factory import NetworkFactory
from networks.network_args import Reader, truth
from networks.products import divisors_near, layer_shape_of, with_core
from networks.recompute import recomputed

_START = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_t2"}  # the others start at zero


def divisor(text: str) -> int:
    """A whole number, 1 or more, or -1 for the most even division."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None
    if value < 1 and value != -1:
        raise ValueError("must be 1 or more, or -1 for the most even division")
    return value


@dataclass(frozen=True, slots=True)
class Blocks:
    """Shapes (a, c) of the small and (b, d) of the larger block, and which of them are products of thin matrices."""

    small: tuple[int, int]
    large: tuple[int, int]
    small_is_thin: bool
    large_is_thin: bool
    has_core: bool

    @classmethod
    def planned(
        cls, shape: tuple[int, ...], rank: int, factor: int, decompose_both: bool, full_matrix: bool, use_tucker: bool
    ) -> Blocks:
        """LyCORIS' choice for a new adapter: a block is thin where that has fewer values than half of the whole."""
        (a, b), (c, d) = divisors_near(shape[0], factor), divisors_near(shape[1], factor)
        is_thin = rank < max(b, d) / 2 and not full_matrix
        has_core = use_tucker and is_thin and shape[2:] not in ((), (1, 1))
        return cls((a, c), (b, d), decompose_both and rank < max(a, c) / 2 and not full_matrix, is_thin, has_core)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], taps: int) -> Blocks:
        """Those of a file's tensors, for a layer with ``taps`` values per kernel."""
        whole, core = tensors.get("lokr_w1"), "lokr_t2" in tensors
        first = whole if whole is not None else tensors["lokr_w1_a"]
        small = (first.shape[0], first.shape[1] if whole is not None else tensors["lokr_w1_b"].shape[1])
        large = _large_sides(tensors)
        return cls(small, (large[0], large[1] // taps), whole is None, "lokr_w2" not in tensors, core)


class LokrAdapter(Adapter):
    """C is ``lokr_w1`` or ``lokr_w1_a @ lokr_w1_b``; B is ``lokr_w2`` (b, d, K, K) or ``lokr_w2_a @ lokr_w2_b``.

    The tensors ``lokr_w2_a`` and ``lokr_w2_b`` are (b, R) and (R, d·K·K), but (R, b) and (R, d) around a Tucker core
    ``lokr_t2``, (R, R, K, K).
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w2", "alpha")
    optional_names: ClassVar[tuple[str, ...]] = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    plus_names: ClassVar[tuple[str, ...]] = ("lokr_w2", "lokr_w2_b")
    arguments: ClassVar[Mapping[str, Reader]] = {
        "factor": divisor,
        "decompose_both": truth,
        "full_matrix": truth,
        "use_tucker": truth,
    }
    is_whole = False

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        size: AdapterSize,
        multiplier: float = 1.0,
        dropouts: Dropouts = NO_DROPOUT,
        factor: int = -1,
        decompose_both: bool = False,
        full_matrix: bool = False,
        use_tucker: bool = False,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(name, layer, size, multiplier, dropouts)
        shape, rank = tuple(cast(Tensor, layer.weight).shape), size.rank
        self._kernel = shape[2:]
        if stored is None:
            blocks = Blocks.planned(shape, rank, factor, decompose_both, full_matrix, use_tucker)
        else:
            blocks = Blocks.of(stored, torch.Size(self._kernel).numel())
        self.blocks = blocks
        (a, c), (b, d) = blocks.small, blocks.large
        flat = d * torch.Size(self._kernel).numel()
        small = {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)} if blocks.small_is_thin else {"lokr_w1": (a, c)}
        if blocks.has_core:
            large = {"lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d), "lokr_t2": (rank, rank, *self._kernel)}
        elif blocks.large_is_thin:
            large = {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, flat)}
        else:
            large = {"lokr_w2": (b, d, *self._kernel)}
        for tensor_name, sides in {**small, **large}.items():
            self.register_parameter(tensor_name, nn.Parameter(torch.zeros(sides)))
        self.is_whole = not blocks.small_is_thin and not blocks.large_is_thin
        if self.is_whole:
            self.alpha.fill_(float(rank))
        self.refresh()

    @classmethod
    def fits(cls, names: Collection[str]) -> bool:
        given = {*names}
        thin1, thin2 = {"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2_a", "lokr_w2_b"}
        blocks = {"lokr_w1", "lokr_w2", *cls.optional_names}
        others = {*cls.tensor_names} - blocks
        return (
            others - {"alpha"} <= given <= others | blocks
            and given & {"lokr_w1", *thin1} in ({"lokr_w1"}, thin1)
            and given & {"lokr_w2", *thin2, "lokr_t2"} in ({"lokr_w2"}, thin2, thin2 | {"lokr_t2"})
        )

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        for name in ("lokr_w2_b", "lokr_w1_b"):
            if name in tensors:
                return tensors[name].shape[0]
        # whole blocks do not tell; LyCORIS writes the rank that was asked for as alpha
        alpha = tensors.get("alpha")
        return 1 if alpha is None else max(1, min(int(alpha), *cls.layer_shape(tensors)[:2]))

    @classmethod
    def layer_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        small = Blocks.of(tensors, 1).small
        outputs, flat = _large_sides(tensors)
        known = tensors.get("lokr_w2", tensors.get("lokr_t2"))
        if known is None:
            return layer_shape_of(small[0] * outputs, small[1] * flat)
        kernel = known.shape[2:]
        return (small[0] * outputs, small[1] * flat // torch.Size(kernel).numel(), *kernel)

    @classmethod
    def structure_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"stored": tensors}

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 if both blocks are whole."""
        return 1.0 if self.is_whole else super().scale

    def start(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name in _START:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    # ---- the blocks as matrices, float32

    def _small(self) -> list[Tensor]:
        """C (a, c), or the two matrices whose product it is."""
        return [self._parameter(name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if name in self._parameters]

    def _large(self) -> list[Tensor]:
        """B (b, d·K·K), or the two matrices whose product it is."""
        if not self.blocks.large_is_thin:
            return [self._parameter("lokr_w2").flatten(1)]
        up, down = self._parameter("lokr_w2_a"), self._parameter("lokr_w2_b")
        return [up.T.contiguous(), with_core(self._parameter("lokr_t2"), down)] if self.blocks.has_core else [up, down]

    def _parameter(self, name: str) -> Tensor:
        return cast(Tensor, self._parameters[name]).float()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        small, large = _as_pair(self._small()), _as_pair(self._large())
        shape = cast(Tensor, self.layer.weight).shape
        if small[1].shape[0] * large[1].shape[0] >= min(shape[0], shape[1:].numel()):
            return None
        return _kron(small[0], large[0]) * self.scale, _kron(small[1], large[1])

    def delta_weight(self) -> Tensor:
        product = _kron(_product(self._small()) * self.scale, _product(self._large()))
        return product.reshape(cast(Tensor, self.layer.weight).shape)

    def delta_norm(self) -> Tensor:
        return _product(self._small()).norm() * _product(self._large()).norm() * abs(self.scale)

    @torch.no_grad()
    def scale_delta_(self, ratio: Tensor) -> None:
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"):
            if name in self._parameters:
                self.get_parameter(name).mul_(ratio.sqrt())

    def change(self, x: Tensor) -> Tensor:
        if self.blocks.large_is_thin:
            return self._thinned(self._by_blocks(x))
        # what lies between two whole blocks is as large as x
        return self._thinned(recomputed(self._by_blocks, x, tuple(self.parameters())))

    def _by_blocks(self, x: Tensor) -> Tensor:
        (_, c), (_, d) = self.blocks.small, self.blocks.large
        small_ac = (_product(self._small()) * self.scale).to(x.dtype)
        large = [matrix.to(x.dtype) for matrix in self._large()]
        if not self._is_conv:
            hidden = F.linear(x.unflatten(-1, (c, d)), large[-1])  # (..., c, R) or (..., c, b)
            hidden = small_ac @ hidden
            return (hidden if len(large) == 1 else F.linear(hidden, large[0])).flatten(-2)
        pixels = x.unflatten(1, (c, d)).flatten(0, 1)
        hidden = self._operate(pixels, large[-1].view(-1, d, *self._kernel))
        sides = hidden.shape[1:]
        hidden = (small_ac @ hidden.reshape(x.shape[0], c, -1)).view(-1, *sides)  # (B·a, R or b, H, W)
        hidden = hidden if len(large) == 1 else F.conv2d(hidden, large[0][:, :, None, None])
        return hidden.reshape(x.shape[0], -1, *sides[1:])


class DoraLokr(Decomposed, LokrAdapter):
    """LoKr with trained magnitudes (DoRA)."""

    tensor_names: ClassVar[tuple[str, ...]] = ("dora_scale", *LokrAdapter.tensor_names)
    arguments: ClassVar[Mapping[str, Reader]] = {**LokrAdapter.arguments, **Decomposed.arguments}


def _large_sides(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(b, d·K·K) of a file's tensors."""
    whole, core = tensors.get("lokr_w2"), tensors.get("lokr_t2")
    if whole is not None:
        return whole.shape[0], whole[0].numel()
    up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    return (up.shape[0], down[0].numel()) if core is None else (up.shape[1], down.shape[1] * core[0, 0].numel())


def _product(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


def _kron(first_MN: Tensor, second_PQ: Tensor) -> Tensor:
    """The Kronecker product. torch.kron refuses some strides, as rows of one number have them."""
    product_MPNQ = first_MN[:, None, :, None] * second_PQ[None, :, None, :]
    return product_MPNQ.reshape(first_MN.shape[0] * second_PQ.shape[0], first_MN.shape[1] * second_PQ.shape[1])


def _as_pair(matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two matrices with the given product and the smallest inner width."""
    if len(matrices) == 2:
        return matrices[0], matrices[1]
    (matrix,) = matrices
    eye = torch.eye(min(matrix.shape), device=matrix.device)
    return (matrix, eye) if matrix.shape[1] <= matrix.shape[0] else (eye, matrix)


_FACTORY = NetworkFactory("networks.lokr", LokrAdapter, {"dora_wd": DoraLokr})
create_network = _FACTORY.create_network
create_network_from_weights = _FACTORY.create_network_from_weights
reads, inspect_weights = _FACTORY.reads, _FACTORY.inspect_weights
