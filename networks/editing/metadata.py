"""Metadata of networks that tools make: ranks and alphas as they are in the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from networks.editing.precision import is_spatial
from networks.network import common

# Arguments of training that gave ranks to layers; a network of other ranks must not be said to have them.
_RANK_ARGUMENTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "unit")


def with_sizes(
    metadata: Mapping[str, str], modules: Iterable[Mapping[str, Tensor]], is_whole: bool = True
) -> dict[str, str]:
    """``metadata`` with the ranks and alphas of LoRA modules, which are pairs of down and up.

    Entries that differ among the layers are ``Dynamic``. ``is_whole``: there are no modules of other types beside.
    """
    plain: list[tuple[int, float]] = []
    spatial: list[tuple[int, float]] = []
    for tensors in modules:
        down = tensors["lora_down.weight"]
        (spatial if is_spatial(down.shape) else plain).append((down.shape[0], float(tensors["alpha"])))
    shown = plain or spatial
    result = dict(metadata)
    # Diffusers' and PEFT's own record of ranks and alphas, which now stand in tensors
    result.pop("lora_adapter_metadata", None)
    result["ss_network_dim"] = common(rank for rank, _ in shown)
    result["ss_network_alpha"] = common(alpha for _, alpha in shown)
    if is_whole:
        result["ss_network_module"] = "networks.lora"
    arguments = _arguments(metadata.get("ss_network_args"))
    arguments = {key: value for key, value in arguments.items() if key not in _RANK_ARGUMENTS}
    if spatial:
        arguments |= {"conv_dim": common(r for r, _ in spatial), "conv_alpha": common(a for _, a in spatial)}
    if arguments or "ss_network_args" in metadata:
        result["ss_network_args"] = json.dumps(arguments)
    return result


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        loaded = json.loads(text or "{}")
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}
