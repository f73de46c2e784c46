"""Hypernetworks: small MLPs that change what the keys and values of attention layers are made of.

A layer whose keys and values come from vectors x of width I gets x + strength · mlp(x), with one MLP for keys and one
for values for each width (self-attention: the levels' widths; cross-attention: the text's). The files are pickles
``{width: (state of the keys' MLP, state of the values' MLP)}``, with words on activations beside the widths; older
ones have two linear layers and nothing else.

Shapes: B batch rows, T tokens or places, I width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.checkpoint.io import is_safetensors
from library.checkpoint.pickles import read_pickle
from library.generation.engine import Engine
from library.log import UserError
from library.options.generation import GenNetworkOptions

logger = logging.getLogger(__name__)

_KEY = re.compile(r"^linear\.?(?P<place>\d+)\.(?P<name>weight|bias)$")  # older files have no dot
_PROJECTION = re.compile(r"\.attn[12]\.(?P<kind>to_k|to_v)$")
_OTHER_ACTIVATIONS = {"linear": "Identity", "swish": "Hardswish"}


@dataclass(frozen=True)
class Hypernetwork:
    """``keys`` and ``values``: the MLP for each input width."""

    name: str
    keys: Mapping[int, nn.Module]
    values: Mapping[int, nn.Module]


def read_hypernetwork(path: str | Path) -> Hypernetwork:
    """Read a hypernetwork file. Raises UserError for files of another kind."""
    path = Path(path)
    if is_safetensors(path):
        raise UserError(f"{path} is no hypernetwork: those are .pt files")
    loaded: Any = read_pickle(path)
    pairs = {key: value for key, value in loaded.items() if isinstance(key, int)} if isinstance(loaded, dict) else {}
    if not pairs or not all(isinstance(value, list | tuple) and len(value) == 2 for value in pairs.values()):
        raise UserError(f"{path} holds no hypernetwork (pairs of layers by width)")
    activation = _activation(str(loaded.get("activation_func") or "linear"), path)
    is_last_active = bool(loaded.get("activate_output"))

    def side(index: int) -> dict[int, nn.Module]:
        return {width: _mlp(pair[index], width, activation, is_last_active, path) for width, pair in pairs.items()}

    return Hypernetwork(str(loaded.get("name") or path.stem), side(0), side(1))


def _activation(name: str, path: Path) -> type[nn.Module]:
    from torch.nn.modules import activation

    known = {kind.lower(): kind for kind in activation.__all__}
    kind = _OTHER_ACTIVATIONS.get(name.lower(), known.get(name.lower()))
    if kind is None:
        raise UserError(f"{path}: its activation {name} is not known here")
    return getattr(nn, kind)


def _mlp(
    state: Mapping[str, Tensor], width: int, activation: type[nn.Module], is_last_active: bool, path: Path
) -> nn.Module:
    """The layers in the order of their numbers; what has no tensors (activations, dropout) leaves gaps in them."""
    places: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.match(key)
        if match is None:
            raise UserError(f"{path} holds no hypernetwork that is known here (tensor {key} of width {width})")
        places.setdefault(int(match["place"]), {})[match["name"]] = tensor.float()
    ordered = [tensors for _, tensors in sorted(places.items())]
    last = max(index for index, tensors in enumerate(ordered) if tensors["weight"].dim() == 2)
    layers: list[nn.Module] = []
    for index, tensors in enumerate(ordered):
        layers.append(_layer(tensors))
        if tensors["weight"].dim() == 2 and (index != last or is_last_active):
            layers.append(activation())
    ends = ordered[0]["weight"].shape[-1], ordered[last]["weight"].shape[0]
    if ends != (width, width):
        raise UserError(f"{path}: the layers for width {width} go from {ends[0]} to {ends[1]}")
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _layer(tensors: Mapping[str, Tensor]) -> nn.Module:
    weight = tensors["weight"]
    layer = nn.LayerNorm(weight.shape[0]) if weight.dim() == 1 else nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict(dict(tensors))
    return layer


def attach_hypernetworks(engine: Engine, options: GenNetworkOptions) -> None:
    """Let the hypernetworks of the options act in the engine's U-Net from now on. Raises UserError."""
    files, strengths = options.hypernetwork_weights or [], options.hypernetwork_mul or []
    if len(strengths) > len(files):
        raise UserError(f"--hypernetwork_mul has {len(strengths)} values for {len(files)} --hypernetwork_weights")
    for file, strength in zip(files, [*strengths, *[1.0] * (len(files) - len(strengths))], strict=True):
        network = read_hypernetwork(file)
        count = _attach(engine, network, strength)
        if count == 0:
            raise UserError(f"--hypernetwork_weights {file}: no layer of this model has its widths; it is for another")
        logger.info("hypernetwork %s at %g: %d layers", network.name, strength, count)


def _attach(engine: Engine, network: Hypernetwork, strength: float) -> int:
    count = 0
    for path, layer in engine.parts.unet.named_modules():
        match = _PROJECTION.search(path)
        if match is None or not isinstance(layer, nn.Linear):
            continue
        mlp = (network.keys if match["kind"] == "to_k" else network.values).get(layer.in_features)
        if mlp is not None:
            mlp.to(engine.settings.device, engine.settings.dtype)
            layer.register_forward_pre_hook(_changing(mlp, strength))
            count += 1
    return count


def _changing(mlp: nn.Module, strength: float) -> Any:
    def change(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTI: Tensor = args[0]
        return x_BTI + mlp(x_BTI) * strength, *args[1:]

    return change
