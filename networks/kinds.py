"""Which types of adapters there are, and of which type the modules of a file are.

Every subclass of `Adapter` in a module of this package is a type; no list has to be kept.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import networks
from library.checkpoint.inspection import is_finite, low_rank_norms
from library.log import UserError
from networks.adapter import Adapter
from networks.weights import WeightTable, read_weights

_PLAIN_PAIR = {"lora_down.weight", "lora_up.weight", "alpha"}


@functools.cache
def adapter_types() -> tuple[type[Adapter], ...]:
    """All types that can be made, in the order of their modules' names."""
    for info in pkgutil.iter_modules(networks.__path__):
        importlib.import_module(f"networks.{info.name}")
    found: list[type[Adapter]] = []
    waiting: list[type[Adapter]] = [Adapter]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith("networks.") and not inspect.isabstract(kind) and kind not in found:
                found.append(kind)
    return tuple(sorted(found, key=lambda kind: (kind.__module__, kind.__name__)))


def kind_of(
    names: Collection[str], preferred: Sequence[type[Adapter]] = (), prefix: str | None = None
) -> type[Adapter] | None:
    """The type of a module whose tensors have these names; None if there is none.

    Of several, one with the ``prefix`` that the file has, and of these ``preferred`` ones first.
    """
    own = [kind for kind in adapter_types() if kind.has_own_files]
    fitting = [kind for kind in (*preferred, *own) if kind.fits(names)]
    return next((kind for kind in fitting if kind.prefix == prefix), fitting[0] if fitting else None)


def require_whole(table: WeightTable, preferred: Sequence[type[Adapter]] = ()) -> dict[str, type[Adapter]]:
    """The type of every module of a file. Raises UserError for modules that are incomplete or of no type."""
    kinds: dict[str, type[Adapter]] = {}
    for module, tensors in table.modules.items():
        kind = kind_of(tensors, preferred, table.prefixes.get(module))
        if kind is None:
            raise UserError(_what_is_wrong(table, module))
        if not _has_sizes(kind, tensors):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise UserError(f"{table.source} is damaged: {module} has tensors of impossible shapes ({shapes})")
        kinds[module] = kind
    return kinds


def _has_sizes(kind: type[Adapter], tensors: Mapping[str, Tensor]) -> bool:
    """True if rank, alpha and layer can be told from a module's tensors."""
    try:
        kind.layer_shape(tensors)
        return kind.size_of(tensors).rank > 0
    except (IndexError, KeyError, RuntimeError, ValueError):
        return False


def _what_is_wrong(table: WeightTable, module: str) -> str:
    names = set(table.modules[module])
    near = [kind for kind in adapter_types() if names <= {*kind.tensor_names, *kind.optional_names}]
    if near:
        lacks = min(({*kind.tensor_names} - names - {"alpha"} for kind in near), key=len)
        return f"{table.source} is incomplete: {module} has no {' and no '.join(sorted(lacks))}"
    made_by = table.metadata.get("ss_network_module")
    hint = f"; it was made by {made_by}, which may read it" if made_by else ""
    return f"{table.source}: {module} is of a kind that is not known here ({', '.join(sorted(names))}){hint}"


def require_finite(table: WeightTable) -> None:
    """Raise UserError for NaN and infinite values: of them nothing sensible can be computed."""
    wrong = [key for key, tensor in table.flat().items() if not is_finite(tensor)]
    if wrong:
        raise UserError(
            f"{table.source}: {len(wrong)} tensors hold NaN or infinite values, first {wrong[0]}; the network is broken"
        )


def read_network(path: str | Path) -> tuple[WeightTable, dict[str, type[Adapter]]]:
    """A network file of any kind and the type of each of its modules. Raises UserError."""
    table = read_weights(path)
    return table, require_whole(table)


# ---- adapters without a model


def shell(shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None) -> nn.Module:
    """A layer of this weight shape that holds the given tensors (not copies), or nothing at all (meta)."""
    with torch.device("meta"):
        made: nn.Module
        if len(shape) == 2:
            made = nn.Linear(shape[1], shape[0], bias=bias is not None)
        else:
            made = nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=bias is not None)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            setattr(made, name, nn.Parameter(tensor, requires_grad=False))
    return made.requires_grad_(False)


def adapter_of(
    name: str,
    tensors: Mapping[str, Tensor],
    kind: type[Adapter] | None = None,
    layer: nn.Module | None = None,
) -> Adapter:
    """The adapter of a module of a file, loaded, frozen and in float32, on ``layer`` or on an empty `shell`.

    Raises UserError if the type is unknown, or if it needs a layer's own weight and none is given.
    """
    kind = kind or kind_of(tensors)
    if kind is None:
        raise UserError(f"{name} is of a kind that is not known here ({', '.join(sorted(tensors))})")
    if layer is None:
        shape = kind.layer_shape(tensors)
        if shape is None or kind.needs_weight:
            raise UserError(f"{name}: what {kind.__name__} does depends on the base model, which is not given here")
        layer = shell(shape)
    adapter = kind.for_tensors(name, layer, tensors)
    try:
        adapter.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    except RuntimeError as error:
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items())
        raise UserError(f"{name}: its tensors do not fit each other ({shapes}); the file is damaged") from error
    return adapter.requires_grad_(False).eval()


def weight_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of the weight change of every module of a file, where it can be told without the base model.

    Plain pairs of matrices are measured as they are, which is much faster than making an adapter of each.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, tensor_name = key.partition(".")
        modules.setdefault(module, {})[tensor_name] = tensor
    pairs = {module for module, own in modules.items() if own.keys() == _PLAIN_PAIR}
    norms = low_rank_norms({key: tensor for key, tensor in tensors.items() if key.partition(".")[0] in pairs})
    for module in modules.keys() - pairs:
        own = modules[module]
        kind = kind_of(own)
        if kind is not None and not kind.needs_weight and kind.layer_shape(own) is not None:
            norms[module] = float(adapter_of(module, own, kind).delta_norm())
    return norms
