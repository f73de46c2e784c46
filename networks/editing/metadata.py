"""Metadata of networks that tools make: ranks and alphas as they are in the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

# Arguments of training that gave ranks to layers; a network of other ranks must not be said to have them.
_RANK_ARGUMENTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "unit")
DYNAMIC = "Dynamic"


def with_sizes(
    metadata: Mapping[str, str], sizes: Mapping[str, tuple[int, float, bool]], is_whole: bool = True
) -> dict[str, str]:
    """``metadata`` with the ranks and alphas of LoRA modules: by name (rank, alpha, has a spatial kernel).

    Entries that differ among the layers are ``Dynamic``. ``is_whole``: there are no modules of other types beside.
    """
    plain = [(rank, alpha) for rank, alpha, is_spatial in sizes.values() if not is_spatial]
    spatial = [(rank, alpha) for rank, alpha, is_spatial in sizes.values() if is_spatial]
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


def common(values: Iterable[float]) -> str:
    """The value that all have, as text, or ``Dynamic``."""
    found = set(values)
    return str(found.pop()) if len(found) == 1 else DYNAMIC


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        loaded = json.loads(text or "{}")
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}
