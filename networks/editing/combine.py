"""Merge networks with each other: the weighted sum of their weight changes, exactly or to a chosen rank.

The factors of all networks are stacked, up beside up and down below down, so the product is the weighted sum, and its
rank the sum of the ranks. Nothing is lost before the singular values decide what to leave out.

Shape legend: O output width, I flattened input width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.checkpoint.keymap import same_matrix
from library.log import UserError, progress
from library.rng import torch_stream
from networks.editing.addends import Addend
from networks.editing.layers import ModelLayer
from networks.editing.precision import clamped, is_spatial, scaled_pair
from networks.kinds import adapter_of
from networks.lowrank import product_svd, stacked_product
from networks.ranks import kept_count

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CombinePlan:
    """How the sum is stored.

    ``rank``, ``conv_rank`` (kernels larger than 1x1): the largest ranks, None: that of the stacked factors, exact.
    ``clamp_quantile``: values of the factors beyond this quantile of their sizes are cut to it; 1 cuts nothing.
    ``shuffle_seed``: mix the ranks by a random rotation, which leaves the product as it is.
    """

    rank: int | None = None
    conv_rank: int | None = None
    clamp_quantile: float = 1.0
    shuffle_seed: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Combined:
    """A module of the merged network: LoRA tensors as they are saved, and the layer's weight shape."""

    tensors: Mapping[str, Tensor]
    shape: Shape


Term = tuple[float, Tensor, Tensor]


@torch.no_grad()
def combine(addends: Sequence[Addend], layers: Sequence[ModelLayer], plan: CombinePlan) -> dict[str, Combined]:
    """The modules of the weighted sum, by name: all that any of the networks has. ``layers``: those of the model.

    Raises UserError for types without thin factors, and for modules whose sizes do not fit each other.
    """
    known = {layer.name: layer for layer in layers}
    addends = [addend.named_for(layers) for addend in addends]
    _require_factors(addends)
    names = list(dict.fromkeys(name for addend in addends for name in addend.table.modules))
    combined = ((name, _combined(name, known.get(name), addends, plan)) for name in progress(names, "merging"))
    found = {name: module for name, module in combined if module is not None}
    if not found:
        raise UserError("--ratios and --block_weights leave nothing: every layer has the weight 0")
    return found


def _require_factors(addends: Sequence[Addend]) -> None:
    """Found out for one module of each type, before anything is computed."""
    problems: list[str] = []
    for addend in addends:
        for kind in sorted(set(addend.kinds.values()), key=lambda kind: kind.__name__):
            name = next(name for name, own in addend.kinds.items() if own is kind)
            tensors = addend.table.modules[name]
            if not kind.needs_weight and adapter_of(name, tensors, kind).factors() is not None:
                continue
            reason = "depends on the base model" if kind.needs_weight else "is no product of thin matrices"
            problems.append(
                f"{addend.table.source}: what {kind.__name__} does {reason}, so it cannot be merged with another "
                f"network ({name}); merge it into a model with --sd_model"
            )
    if problems:
        raise UserError.of(problems)


def _combined(name: str, layer: ModelLayer | None, addends: Sequence[Addend], plan: CombinePlan) -> Combined | None:
    """The sum of one module; None if its weights are all 0."""
    terms: list[Term] = []
    shapes: list[Shape] = []
    for addend in addends:
        tensors = addend.table.modules.get(name)
        if tensors is None:
            continue
        kind = addend.kinds[name]
        factors, shape = adapter_of(name, tensors, kind).factors(), kind.layer_shape(tensors)
        if factors is None or shape is None:
            raise UserError(f"{addend.table.source}: {name} is no product of thin matrices and cannot be merged")
        if shapes and not same_matrix(shapes[0], shape):
            raise UserError(
                f"{addend.table.source}: {name} is for a layer of {shape}, in another file of {shapes[0]}; they were "
                "made for different base models"
            )
        shapes.append(shape)
        strength = addend.ratio if layer is None else addend.strength_of(layer)
        if strength:
            terms.append((strength, factors[0].to(plan.device), factors[1].to(plan.device)))
    if not terms:
        return None
    up_OR, down_RI = _stored(name, *stacked_product(terms), shapes[0], plan)
    return Combined(scaled_pair(up_OR, down_RI, 1.0, shapes[0], plan.dtype), shapes[0])


def _stored(name: str, up_OR: Tensor, down_RI: Tensor, shape: Shape, plan: CombinePlan) -> tuple[Tensor, Tensor]:
    limit = plan.conv_rank if is_spatial(shape) else plan.rank
    if limit is not None:
        svd = product_svd(up_OR, down_RI)
        up_OR, down_RI = svd.truncated(kept_count(svd.singular_K, limit))
    if plan.shuffle_seed is not None:
        turn_RR = rotation(down_RI.shape[0], torch_stream(plan.shuffle_seed, "shuffle", name)).to(down_RI.device)
        up_OR, down_RI = up_OR @ turn_RR, turn_RR.T @ down_RI
    up_OR, down_RI = balanced(up_OR, down_RI)
    return clamped(up_OR, down_RI, plan.clamp_quantile)


def balanced(up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each rank's column of up as long as its row of down: half precision then holds both well.

    Ranks without effect are left alone.
    """
    up_R, down_R = up_OR.norm(dim=0), down_RI.norm(dim=1)
    root_R = torch.where((up_R > 0) & (down_R > 0), (down_R / up_R.clamp(min=1e-30)).sqrt(), 1.0)
    return up_OR * root_R, down_RI / root_R[:, None]


def rotation(rank: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (R, R), all alike likely: Q of a normal matrix, with the signs of R's diagonal.

    F. Mezzadri, "How to generate random matrices from the classical compact groups", arXiv:math-ph/0609050, section 5.
    """
    q_RR, r_RR = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    return (q_RR * r_RR.diagonal().sign()).float()
