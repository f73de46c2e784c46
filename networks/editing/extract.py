"""A LoRA of what distinguishes a tuned model from the original: the first singular values of each layer's change.

Both models are read tensor by tensor; one pair is in memory at a time. Shape legend: O output width, I flattened input
width, R rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoint.inspection import NetworkCheck
from library.device import save_dtype
from library.families import family_named
from library.families.files import modelspec_of
from library.log import UserError, progress
from library.models.spec import ArchitectureSpec, PredictionType
from library.models.stream import OpenModel, open_model
from library.options.network_tools import ExtractOptions
from library.rng import torch_stream
from networks.editing.difference import Change, Comparison, check_same_kind, group_of, square_of
from networks.editing.layers import ModelLayer, model_layers
from networks.editing.metadata import with_sizes
from networks.editing.precision import clamped, is_spatial, network_path, require_other, scaled_pair, tool_device
from networks.editing.report import report
from networks.lowrank import FAILURE, ThinSvd, gram_svd, randomised_svd
from networks.ranks import kept_count
from networks.weights import file_tensors, write_weights

logger = logging.getLogger(__name__)

SMALL_SIDE = 512  # below it the exact decomposition is as fast as the randomised one
Part = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """Ranks, without and with a spatial kernel (None leaves those and the ResNets out), and how to decompose."""

    rank: int
    conv_rank: int | None = None
    exact: bool = False
    clamp_quantile: float = 1.0
    min_diff: float = 0.01
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def rank_for(self, shape: tuple[int, ...]) -> int:
        """The largest rank of a layer with this weight shape."""
        return self.conv_rank or self.rank if is_spatial(shape) else self.rank


@dataclass(frozen=True)
class Extracted:
    """Modules by name as tensors of a LoRA, and what they hold of the change."""

    modules: Mapping[str, Mapping[str, Tensor]]
    change: Change
    unchanged: int


@torch.no_grad()
def extract(comparison: Comparison, plan: ExtractPlan) -> Extracted:
    """Decompose the change of every layer in reach, and measure what lies outside. Raises UserError."""
    spec = comparison.original.found.spec
    layers = _layers(comparison, spec, plan)
    change = Change()
    modules: dict[str, Mapping[str, Tensor]] = {}
    unchanged = 0
    keys = list(comparison.keys())
    for part, key in progress(keys, "comparing", total=len(keys)):
        layer = layers.get((part, key))
        if not comparison.can_compare(part, key):
            if layer is not None:
                raise UserError(f"{part} {key}: the models have no such layer in common, or of other widths")
            change.incomparable[group_of(part, key)] += 1
            continue
        delta = comparison.delta(part, key)
        square = square_of(delta)
        if not math.isfinite(square):
            raise UserError(f"{part} {key}: one of the models has NaN or infinite values there; it is broken")
        if layer is None:
            change.add_outside(group_of(part, key), square)
        elif not square:
            unchanged += 1
        else:
            change.inside += square
            modules[layer.name] = _module(layer, delta, square, spec, plan, change)
    return Extracted(modules, change, unchanged)


def _layers(comparison: Comparison, spec: ArchitectureSpec, plan: ExtractPlan) -> dict[Part, ModelLayer]:
    """The layers that get a module, by part and key of their weights."""
    chosen = {
        (layer.folder, f"{layer.path}.weight"): layer
        for layer in model_layers(spec)
        if plan.conv_rank is not None or layer.part == "text_encoder" or ".attentions." in layer.path
    }
    text = [place for place, layer in chosen.items() if layer.part == "text_encoder"]
    largest = 0.0
    for place in text:
        if largest > plan.min_diff or not comparison.can_compare(*place):
            break
        largest = max(largest, float(comparison.delta(*place).abs().max()))
    if largest <= plan.min_diff:
        logger.info(
            "text encoders: no weight differs by more than %g (largest %.3g); they are left out", plan.min_diff, largest
        )
        chosen = {place: layer for place, layer in chosen.items() if layer.part != "text_encoder"}
    return chosen


def _module(
    layer: ModelLayer, delta: Tensor, square: float, spec: ArchitectureSpec, plan: ExtractPlan, change: Change
) -> dict[str, Tensor]:
    """The LoRA tensors of one layer; notes in ``change`` what they keep."""
    shape = tuple(delta.shape)
    # SD2 and SDXL have matrices for projections in memory, whatever form their file has
    shape = shape[:2] if spec.unet.linear_projection and shape[2:] == (1, 1) and "proj_" in layer.path else shape
    delta_OI = delta.flatten(1).to(plan.device)
    rank = min(plan.rank_for(shape), *delta_OI.shape)
    svd, best, is_bound = decomposed(delta_OI, rank, layer.name, plan.exact)
    up_OR, down_RI = svd.truncated(kept_count(svd.singular_R, rank))
    up_OR, down_RI = clamped(up_OR, down_RI, plan.clamp_quantile)
    lost = square_of(torch.addmm(delta_OI, up_OR, down_RI, alpha=-1))
    change.lost += lost
    change.best += max(square - lost, min(square, best))
    change.bounded += is_bound
    return scaled_pair(up_OR, down_RI, 1.0, shape, plan.dtype)


def decomposed(delta_OI: Tensor, rank: int, name: str, exact: bool) -> tuple[ThinSvd, float, bool]:
    """The first singular values, the largest squared norm that any matrix of that rank can keep, and if that is only a
    bound.
    """
    if exact or min(delta_OI.shape) <= max(SMALL_SIDE, 2 * rank):
        svd = gram_svd(delta_OI, rank)
        return svd, square_of(svd.singular_R), False
    sketch = randomised_svd(delta_OI, rank, torch_stream(0, "extract", name))
    return sketch.svd, (sketch.best_share * sketch.norm) ** 2, True


def extract_file(options: ExtractOptions) -> NetworkCheck:
    """Compare the models that the options name, write the network, and report it. Raises UserError."""
    target = network_path(options.save_to)
    require_other(target, [options.model_org, options.model_tuned])
    plan = ExtractPlan(
        options.dim,
        options.conv_dim,
        options.exact,
        options.clamp_quantile,
        options.min_diff,
        save_dtype(options.save_precision) or torch.float32,
        tool_device(options.device),
    )
    with open_model(Path(str(options.model_org))) as original, open_model(Path(str(options.model_tuned))) as tuned:
        check_same_kind(original, tuned)
        _tell_flags(options, original)
        done = extract(Comparison(original, tuned, save_dtype(options.load_precision)), plan)
    if not done.modules:
        raise UserError("the layers that a LoRA reaches do not differ: there is nothing to extract")
    _tell(done)
    metadata = _metadata(options, done, original, plan)
    tensors = file_tensors(done.modules, dict.fromkeys(done.modules, "lora"))
    write_weights(target, tensors, plan.dtype, metadata)
    return report(target)


def _tell_flags(options: ExtractOptions, original: OpenModel) -> None:
    family = original.found.spec.family
    for flag, given, needed in (("v2", options.v2, "sd2"), ("sdxl", options.sdxl, "sdxl")):
        if given and family != needed:
            logger.warning("--%s: %s is another kind of model (%s); the flag is ignored", flag, original.path, family)


def _tell(done: Extracted) -> None:
    for line in done.change.lines():
        logger.info("%s", line)
    if done.unchanged:
        logger.info("%d layers are the same in both models and are left out", done.unchanged)
    if done.change.bounded:
        logger.info(
            "%d layers: randomised singular values; what is possible is a bound that fails with probability %.0e "
            "(--exact computes it)",
            done.change.bounded,
            done.change.bounded * FAILURE,
        )


def _metadata(options: ExtractOptions, done: Extracted, original: OpenModel, plan: ExtractPlan) -> dict[str, str]:
    family = original.found.spec.family
    prediction = _prediction(options, original)
    start = {
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": family_named(family).base_model_version(prediction),
        "ss_network_args": "{}",
    }
    metadata = with_sizes(start, done.modules.values())
    if options.no_metadata:
        return metadata
    stem = Path(str(options.save_to)).stem
    return {**metadata, **modelspec_of(family, "lora", stem, prediction).as_metadata()}


def _prediction(options: ExtractOptions, original: OpenModel) -> PredictionType:
    if options.v_parameterization is not None:
        return "v_prediction" if options.v_parameterization else "epsilon"
    default: PredictionType = "v_prediction" if original.found.spec.family == "sd2" else "epsilon"
    return original.found.prediction_type or default
