"""The merging tools: from their options to a written file that was read again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from library.checkpoint.inspection import NetworkCheck
from library.checkpoint.modelspec import title_of
from library.device import save_dtype
from library.families.files import check_target, modelspec_of
from library.models.load import check_written
from library.models.spec import FAMILY_TITLES, FamilyName, PredictionType
from library.models.stream import OpenModel, open_model
from library.options.network_tools import MergeFilesOptions, MergeOptions, SvdMergeOptions
from library.rng import fresh_seed
from networks.editing.addends import (
    Addend,
    common_family,
    layers_of_family,
    read_addends,
    require_family,
    with_block_weights,
)
from networks.editing.combine import Combined, CombinePlan, combine
from networks.editing.into_model import changes_of, merged_tensors
from networks.editing.layers import layout_of
from networks.editing.metadata import with_sizes
from networks.editing.model_output import write_merged
from networks.editing.precision import NETWORK_SUFFIXES, network_path, require_other, tool_device
from networks.editing.report import report
from networks.weights import file_tensors, write_weights

logger = logging.getLogger(__name__)

_COPIED = ("ss_v2", "ss_base_model_version")
_HASHES = "sshs_"


def merge(files: MergeFilesOptions, options: MergeOptions, expected: Sequence[FamilyName]) -> None:
    """Merge into ``--sd_model``, or the networks with each other, write and check. Raises UserError.

    ``expected``: the families that the command line names; another one is only told.
    """
    if options.sd_model:
        unused = [name for name in ("new_rank", "shuffle", "concat") if getattr(options, name)]
        if unused:
            logger.warning("--%s: does nothing with --sd_model", unused[0])
        merge_into_model(files, Path(options.sd_model), expected)
        return
    seed = fresh_seed() if options.seed is None else options.seed
    plan = CombinePlan(
        rank=options.new_rank,
        conv_rank=options.new_rank,
        shuffle_seed=seed if options.shuffle else None,
        dtype=_saved_type(files),
    )
    merge_networks(files, plan, expected)


def svd_merge(files: MergeFilesOptions, options: SvdMergeOptions) -> NetworkCheck:
    """Merge networks with each other to the ranks of the options, write and check. Raises UserError."""
    plan = CombinePlan(
        rank=options.new_rank,
        conv_rank=options.new_conv_rank or options.new_rank,
        clamp_quantile=options.clamp_quantile,
        dtype=_saved_type(files),
        device=tool_device(options.device),
    )
    return merge_networks(files, plan)


# ---- into a model


def merge_into_model(files: MergeFilesOptions, source: Path, expected: Sequence[FamilyName]) -> None:
    """Add the networks to the weights of a model and write it as file or folder. Raises UserError."""
    target = Path(str(files.save_to))
    check_target(target, "--save_to")
    require_other(target, files.models or [])
    addends = read_addends(files.models or [], files.ratios)
    with open_model(source) as model:
        spec = model.found.spec
        _tell_family(spec.family, expected, str(source))
        require_family(addends, spec.family, str(source))
        addends = with_block_weights(addends, files.block_weights, layout_of(spec))
        changes = changes_of(model, addends)
        prediction = _prediction(model, addends)
        kept = {key: value for key, value in model.metadata.items() if not key.startswith(("modelspec.", _HASHES))}
        written = {} if files.no_metadata else _model_metadata(model, addends, target, prediction)
        changed = merged_tensors(model, changes)
        write_merged(model, changed, target, _saved_type(files), {**kept, **written}, prediction)
        by = "1 network" if len(addends) == 1 else f"{len(addends)} networks"
        logger.info("%s: %d layers changed by %s", target.name, len(changes), by)
    for line in check_written(target, spec):
        logger.info("%s", line)


def _prediction(model: OpenModel, addends: Sequence[Addend]) -> PredictionType | None:
    """What the model predicts: by itself, else by the networks; None if none of them says it."""
    return model.found.prediction_type or next(iter(_stated_predictions(addends)), None)


def _stated_predictions(addends: Sequence[Addend]) -> list[PredictionType]:
    """What the networks say that their models predict, those that say it."""
    said: list[PredictionType] = []
    for addend in addends:
        stated = _stated_prediction(addend)
        if stated is not None:
            said.append(stated)
    return said


def _stated_prediction(addend: Addend) -> PredictionType | None:
    said = addend.table.metadata.get("modelspec.prediction_type")
    version = addend.table.metadata.get("ss_base_model_version", "")
    if said is None and not version.startswith("sd_v2"):
        return None
    return "v_prediction" if said == "v" or (said is None and version.endswith("_v")) else "epsilon"


def _model_metadata(
    model: OpenModel, addends: Sequence[Addend], target: Path, prediction: PredictionType | None
) -> dict[str, str]:
    titles = [title_of(model.metadata, model.path.stem), *(addend.title for addend in addends)]
    return modelspec_of(model.found.spec.family, "", _title(target), prediction, titles).as_metadata()


def _title(target: Path) -> str:
    return target.stem if target.suffix in NETWORK_SUFFIXES else target.name


# ---- with each other


def merge_networks(
    files: MergeFilesOptions, plan: CombinePlan, expected: Sequence[FamilyName] = ("sd1", "sd2", "sdxl")
) -> NetworkCheck:
    """Write the weighted sum of networks as one LoRA, and report it. Raises UserError."""
    target = network_path(files.save_to)
    addends = read_addends(files.models or [], files.ratios)
    family = common_family(addends)
    _tell_family(family, expected, addends[0].table.source)
    layers, layout = layers_of_family(family)
    addends = with_block_weights(addends, files.block_weights, layout)
    modules = combine(addends, layers, plan)
    prefixes = dict.fromkeys(modules, "lora")
    tensors = file_tensors({name: module.tensors for name, module in modules.items()}, prefixes)
    write_weights(target, tensors, plan.dtype, _network_metadata(files, modules, addends, family))
    return report(target)


def _network_metadata(
    files: MergeFilesOptions, modules: Mapping[str, Combined], addends: Sequence[Addend], family: FamilyName
) -> dict[str, str]:
    given = [addend.table.metadata for addend in addends]
    copied = {key: next((m[key] for m in given if key in m), None) for key in _COPIED}
    told = {key: value for key, value in copied.items() if value is not None}
    metadata = with_sizes(told, (module.tensors for module in modules.values()))
    if files.no_metadata:
        return metadata
    said = _stated_predictions(addends)
    if len(set(said)) > 1:
        logger.warning("networks for velocity (v) and for noise are merged: the result suits neither model well")
    prediction, titles = said[0] if said else None, [addend.title for addend in addends]
    return {
        **metadata,
        **modelspec_of(family, "lora", _title(Path(str(files.save_to))), prediction, titles).as_metadata(),
    }


# ---- what both share


def _saved_type(files: MergeFilesOptions) -> torch.dtype:
    return save_dtype(files.save_precision or files.precision) or torch.float32


def _tell_family(family: FamilyName, expected: Sequence[FamilyName], what: str) -> None:
    """Options and scripts that name a kind of model are not needed: the files decide."""
    if family not in expected:
        asked = " or ".join(FAMILY_TITLES[name] for name in expected)
        logger.warning("%s is %s, the command line is for %s; the file decides", what, FAMILY_TITLES[family], asked)
