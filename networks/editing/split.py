"""Cut a DyLoRA into networks of fixed ranks: one file for every prefix that was trained to work alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoint.inspection import NetworkCheck
from library.log import UserError, progress
from library.options.network_tools import DyloraSplitOptions
from networks.dylora import DyloraAdapter
from networks.editing.metadata import with_sizes
from networks.editing.report import report
from networks.kinds import read_network
from networks.weights import WeightTable, file_tensors, write_weights

logger = logging.getLogger(__name__)


def prefix_of(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first ``rank`` ranks of a LoRA module, at the strength that they have within it.

    Alpha shrinks with the rank, and is kept in float32: it is then exact. Modules of a smaller rank stay whole.
    """
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    old = down.shape[0]
    kept = min(rank, old)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return {
        "alpha": torch.tensor((alpha or old) * kept / old, dtype=torch.float32),
        "lora_down.weight": down[:kept].contiguous(),
        "lora_up.weight": up[:, :kept].contiguous(),
    }


def ranks_of_cuts(largest: int, unit: int) -> list[int]:
    """Every multiple of the unit below the largest rank, and that itself."""
    return [*range(unit, largest, unit), largest]


def split_file(options: DyloraSplitOptions) -> list[NetworkCheck]:
    """Write one file for each prefix of the DyLoRA that the options name, and report each. Raises UserError."""
    table, kinds = read_network(str(options.model))
    # plain pairs: of a core between them, or of magnitudes, no prefix of the ranks could be cut
    other = [name for name, tensors in table.modules.items() if not DyloraAdapter.fits(tensors)]
    if other:
        raise UserError(f"{table.source}: {other[0]} is {kinds[other[0]].__name__}; only a DyLoRA can be cut")
    largest = max(tensors["lora_down.weight"].shape[0] for tensors in table.modules.values())
    unit = options.unit or largest
    if unit > largest:
        raise UserError(f"--unit {unit}: {table.source} has rank {largest}; choose a unit of at most that")
    if largest % unit:
        logger.warning("--unit %d: rank %d is no multiple of it; was it trained with this unit?", unit, largest)
    base = Path(str(options.save_to))
    checks: list[NetworkCheck] = []
    for rank in progress(ranks_of_cuts(largest, unit), "splitting"):
        target = base.with_name(f"{base.stem}-{rank:04d}{base.suffix}")
        _write(table, rank, largest, target)
        checks.append(report(target))
    return checks


def _write(table: WeightTable, rank: int, largest: int, target: Path) -> None:
    modules = {name: prefix_of(tensors, rank) for name, tensors in table.modules.items()}
    metadata = with_sizes(table.metadata, modules.values())
    old = table.metadata.get("ss_training_comment", "")
    metadata["ss_training_comment"] = f"split from DyLoRA, rank {largest} to {rank}; {old}"
    write_weights(target, file_tensors(modules, dict.fromkeys(modules, "lora")), None, metadata)
