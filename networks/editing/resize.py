"""Change the rank of every module of a network: keep the largest singular values of its weight change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoint.inspection import NetworkCheck
from library.device import save_dtype
from library.log import UserError, progress
from library.options.network_tools import ResizeOptions
from networks.adapter import Adapter
from networks.editing.metadata import with_sizes
from networks.editing.precision import is_spatial, network_path, scaled_pair, tool_device
from networks.editing.report import report
from networks.kinds import adapter_of, read_network, require_finite
from networks.lowrank import ProductSvd, ThinSvd, gram_svd, product_svd
from networks.network import common
from networks.ranks import Kept, RankRule, kept_count, kept_share
from networks.weights import file_tensors, write_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """Largest ranks, for layers with a spatial kernel and for others, and the rule that may choose smaller ones."""

    rank: int
    conv_rank: int
    rule: RankRule | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Resized:
    """A module's new tensors, in the type that is saved, and what is left of its weight change."""

    tensors: Mapping[str, Tensor]
    kept: Kept

    @property
    def alpha(self) -> float:
        """The new alpha."""
        return float(self.tensors["alpha"])


def resize_module(name: str, tensors: Mapping[str, Tensor], kind: type[Adapter], plan: ResizePlan) -> Resized | None:
    """The module as a LoRA of another rank; None if its change depends on a base model (OFT, DoRA).

    alpha/rank stays as it was. Kinds without thin factors go through their dense weight change.
    """
    shape = kind.layer_shape(tensors)
    if shape is None or kind.needs_weight:
        return None
    adapter = adapter_of(name, tensors, kind)
    svd, singular = _decomposed(adapter, plan.device)
    rank = kept_count(singular, plan.conv_rank if is_spatial(shape) else plan.rank, plan.rule)
    up_OR, down_RI = svd.truncated(rank)
    scale = adapter.scale if kind.alpha_scales else 1.0
    pair = scaled_pair(up_OR, down_RI, scale, shape, plan.dtype)
    return Resized(pair, kept_share(singular, rank))


def _decomposed(adapter: Adapter, device: torch.device | str) -> tuple[ProductSvd | ThinSvd, Tensor]:
    factors = adapter.factors()
    if factors is not None:
        up_OR, down_RI = (part.to(device) for part in factors)
        if down_RI.shape[0] < min(up_OR.shape[0], down_RI.shape[1]):
            thin = product_svd(up_OR, down_RI)
            return thin, thin.singular_K
    dense = gram_svd(adapter.delta_weight().flatten(1).to(device))
    return dense, dense.singular_R


@torch.no_grad()
def resize_file(options: ResizeOptions) -> NetworkCheck:
    """Resize the network that the options name, write it, and report what was written. Raises UserError."""
    plan, target = _plan(options), Path(str(options.save_to))
    table, kinds = read_network(str(options.model))
    require_finite(table)
    before = common(kinds[name].rank_of(tensors) for name, tensors in table.modules.items())
    modules: dict[str, Mapping[str, Tensor]] = {}
    resized: dict[str, Resized] = {}
    passed: dict[str, str] = {}
    for name, tensors in progress(table.modules.items(), "resizing", total=len(table.modules)):
        done = resize_module(name, tensors, kinds[name], plan)
        modules[name] = tensors if done is None else done.tensors
        if done is None:
            passed[name] = kinds[name].__name__
        else:
            resized[name] = done
    _say_passed(passed, len(modules), table.source)
    _print_table(resized, options)
    prefixes = {name: kinds[name].prefix if name in passed else "lora" for name in modules}
    metadata = with_sizes(table.metadata, (done.tensors for done in resized.values()), is_whole=not passed)
    metadata["ss_training_comment"] = _comment(options, plan, before, table.metadata)
    write_weights(target, file_tensors(modules, prefixes), plan.dtype, metadata)
    return report(target)


def _plan(options: ResizeOptions) -> ResizePlan:
    problems: list[str] = []
    try:
        network_path(options.save_to)
    except UserError as error:
        problems.append(str(error))
    method, target = options.dynamic_method, options.dynamic_param
    if method is not None and target is None:
        problems.append(f"--dynamic_method {method} needs --dynamic_param")
    elif method in ("sv_fro", "sv_cumulative") and target is not None and target > 1:
        problems.append(f"--dynamic_param {target}: {method} takes a share, from 0 to 1")
    elif method == "sv_ratio" and target is not None and target < 1:
        problems.append(f"--dynamic_param {target}: sv_ratio takes a ratio, 1 or more")
    if problems:
        raise UserError.of(problems)
    if method is None and target is not None:
        logger.warning("--dynamic_param does nothing without --dynamic_method")
    rule = None if method is None or target is None else RankRule(method, target)
    conv_rank = options.new_conv_rank or options.new_rank
    dtype = save_dtype(options.save_precision) or torch.float32
    return ResizePlan(options.new_rank, conv_rank, rule, dtype, tool_device(options.device))


def _say_passed(passed: Mapping[str, str], total: int, source: str) -> None:
    if len(passed) == total:
        raise UserError(
            f"{source}: all of its layers are {', '.join(sorted(set(passed.values())))}, whose change depends on the "
            "base model and has no rank to change"
        )
    if passed:
        logger.warning(
            "%s: %d layers (%s) depend on the base model and stay as they are, first %s",
            source,
            len(passed),
            ", ".join(sorted(set(passed.values()))),
            next(iter(passed)),
        )


def _print_table(resized: Mapping[str, Resized], options: ResizeOptions) -> None:
    shares = torch.tensor([done.kept.frobenius_share for done in resized.values()], dtype=torch.float64)
    if options.verbose:
        for name, done in resized.items():
            print(_row(name, done, options.dynamic_method is not None))
    spread = float(shares.std(correction=0))
    print(f"Average Frobenius norm retention: {float(shares.mean()):.2%} | std: {spread:.3f}")


def _row(name: str, done: Resized, is_dynamic: bool) -> str:
    kept = done.kept
    row = (
        f"{name:75} | sum(S) retained: {kept.sum_share:.1%}, fro retained: {kept.frobenius_share:.1%}, "
        f"max(S) ratio: {kept.max_ratio:.1f}"
    )
    return f"{row}, dynamic | dim: {kept.rank}, alpha: {done.alpha}" if is_dynamic else row


def _comment(options: ResizeOptions, plan: ResizePlan, before: str, metadata: Mapping[str, str]) -> str:
    old = metadata.get("ss_training_comment", "")
    if plan.rule is not None:
        return f"Dynamic resize with {plan.rule.method}: {plan.rule.target} from {before}; {old}"
    return f"dimension is resized from {before} to {options.new_rank} (conv: {plan.conv_rank}); {old}"
