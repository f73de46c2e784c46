"""Merge networks into a whole model, tensor by tensor from file to file.

One layer is in memory at a time, beside the networks. All networks are added in float32 before the result is rounded
once. What no network touches is passed through as it is, also tensors that nobody knows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.checkpoint.io import LazyTensor
from library.checkpoint.keymap import MAX_LISTED, same_matrix
from library.log import UserError
from library.models.stream import OpenModel
from networks.adapter import Adapter
from networks.editing.addends import Addend
from networks.editing.layers import ModelLayer, model_layers
from networks.kinds import adapter_of, shell

logger = logging.getLogger(__name__)

_KEPT_LAYERS = 3  # query, key and value of OpenCLIP stand in one tensor: first their biases are written, then the rest


@dataclass(frozen=True)
class Change:
    """What one network does to one layer."""

    name: str
    kind: type[Adapter]
    tensors: Mapping[str, Tensor]
    strength: float


Changes = Mapping[ModelLayer, Sequence[Change]]


def changes_of(model: OpenModel, addends: Sequence[Addend]) -> Changes:
    """What the networks change in the model, in their order.

    Raises UserError if a network has no layer of this model, or layers of other sizes; layers that the model lacks are
    left out with a warning.
    """
    layers = {layer.name: layer for layer in model_layers(model.found.spec)}
    changes: dict[ModelLayer, list[Change]] = {}
    for addend in addends:
        addend = addend.named_for(list(layers.values()))
        modules = addend.table.modules
        known = {name: layers[name] for name in modules if name in layers}
        _require_fit(addend, known, model)
        for name, layer in known.items():
            strength = addend.strength_of(layer)
            if strength:
                changes.setdefault(layer, []).append(Change(name, addend.kinds[name], modules[name], strength))
    return changes


def _require_fit(addend: Addend, known: Mapping[str, ModelLayer], model: OpenModel) -> None:
    source, modules = addend.table.source, addend.table.modules
    absent = [name for name in modules if name not in known]
    if not known:
        raise UserError(
            f"{source}: none of its {len(modules)} layers exists in {model.path}, first {absent[0]}; it was made for "
            "another base model"
        )
    wrong: list[str] = []
    for name, layer in known.items():
        own, shape = addend.kinds[name].layer_shape(modules[name]), weight_of(model, layer).shape
        if own is not None and not same_matrix(own, shape):
            wrong.append(f"{name} is for {own}, the layer is {shape}")
    if wrong:
        raise UserError(
            f"{source} was made for another base model than {model.path}: {len(wrong)} layers have another size, "
            f"{'; '.join(wrong[: MAX_LISTED // 4])}"
        )
    if absent:
        logger.warning(
            "%s: %d of its %d layers do not exist in the model and are left out, first %s",
            *(source, len(absent), len(modules), absent[0]),
        )


def weight_of(model: OpenModel, layer: ModelLayer) -> LazyTensor:
    """The layer's weight in the model's files."""
    return model.parts[layer.folder][f"{layer.path}.weight"]


def merged_tensors(model: OpenModel, changes: Changes) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of the changed layers by part and canonical key, computed when they are read."""
    merger = _Merger(model, changes)
    found: dict[str, dict[str, LazyTensor]] = {}
    for layer in changes:
        part = found.setdefault(layer.folder, {})
        for key in (f"{layer.path}.weight", f"{layer.path}.bias"):
            value = model.parts[layer.folder].get(key)
            if value is not None:
                part[key] = LazyTensor(value.dtype, value.shape, lambda layer=layer, key=key: merger.read(layer, key))
    return found


class _Merger:
    """Computes a layer when the first of its tensors is asked for, and keeps the other until it is fetched too."""

    def __init__(self, model: OpenModel, changes: Changes) -> None:
        self._model = model
        self._changes = changes
        self._kept: dict[ModelLayer, dict[str, Tensor]] = {}

    def read(self, layer: ModelLayer, key: str) -> Tensor:
        if key not in self._kept.get(layer, {}):
            self._kept[layer] = self._compute(layer)
            if len(self._kept) > _KEPT_LAYERS:
                del self._kept[next(iter(self._kept))]
        tensors = self._kept[layer]
        tensor = tensors.pop(key)
        if not tensors:
            del self._kept[layer]
        return tensor

    def _compute(self, layer: ModelLayer) -> dict[str, Tensor]:
        part = self._model.parts[layer.folder]
        bias = part.get(f"{layer.path}.bias")
        weight, changed_bias = changed_layer(
            part[f"{layer.path}.weight"].read(), None if bias is None else bias.read(), self._changes[layer]
        )
        result = {f"{layer.path}.weight": weight}
        return result if changed_bias is None else {**result, f"{layer.path}.bias": changed_bias}


@torch.no_grad()
def changed_layer(weight: Tensor, bias: Tensor | None, changes: Sequence[Change]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias after the changes, in float32. Where a difference depends on the weight, each network sees what
    the ones before it left."""
    weight, bias = _own_float(weight), None if bias is None else _own_float(bias)
    for change in changes:
        # of a 1x1 convolution the network's own form, so that its tensors fit
        own = change.kind.layer_shape(change.tensors) or tuple(weight.shape)
        layer = shell(own, weight.view(own), bias)
        adapter = adapter_of(change.name, change.tensors, change.kind, layer)
        of_bias = adapter.delta_bias()
        weight.view(own).add_(adapter.delta_weight(), alpha=change.strength)
        if bias is not None and of_bias is not None:
            bias.add_(of_bias, alpha=change.strength)
    return weight, bias


def _own_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
