"""Trees of Python values and tensors as JSON plus named tensors, and back, exactly: what optimizer states are made of.

No pickles: JSON carries the structure, a safetensors file the tensors. Values that JSON lacks stand as one-key
objects whose key begins with ``$``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from library.log import UserError

logger = logging.getLogger(__name__)

Json = Any  # None, bool, int, float, str, list and dict of the same


class TreeWriter:
    """Turns trees into JSON; ``tensors`` collects what they hold. A tensor that stands in several places is kept
    once.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, path: str, *, lenient: bool = False) -> Json:
        """The JSON form of ``value``; ``path`` names its tensors. Values of unknown types raise UserError, or are
        left out with a warning if ``lenient``.
        """
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, Tensor):
            return {"$tensor": self._keep(value, path), "device": value.device.type}
        if isinstance(value, list):
            return [self.encode(item, f"{path}.{i}", lenient=lenient) for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(item, f"{path}.{i}", lenient=lenient) for i, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path, lenient)
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if callable(getattr(value, "item", None)):  # a numpy scalar
            return self.encode(value.item(), path, lenient=lenient)
        if lenient:
            logger.warning("the training state leaves out %s: a %s cannot be saved", path, type(value).__name__)
            return {"$absent": type(value).__name__}
        raise UserError(f"--save_state: {path} is a {type(value).__name__}, which a training state cannot hold")

    def _encode_mapping(self, value: Mapping[Any, Any], path: str, lenient: bool) -> Json:
        encoded = [(key, self.encode(item, f"{path}.{key}", lenient=lenient)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in encoded):
            return dict(encoded)
        return {"$dict": [[self.encode(key, path), item] for key, item in encoded]}

    def _keep(self, tensor: Tensor, path: str) -> str:
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if not tensor.numel() or identity not in self._names:
            self._names[identity] = path
            self.tensors[path] = tensor.detach()
        return self._names[identity]


class TreeReader:
    """The way back. ``tensor`` gives a stored tensor by name; what it gives for a name is asked for once."""

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        self._tensor = tensor
        self._given: dict[tuple[str, torch.device], Tensor] = {}

    def decode(self, value: Json, place: Callable[[str], torch.device] | None = None) -> Any:
        """The tree that ``value`` stands for. ``place`` chooses a tensor's device from the type of its former one
        ("cuda"); without it tensors come on the CPU. ``$absent`` entries of mappings are left out.
        """
        if isinstance(value, list):
            return [self.decode(item, place) for item in value]
        if not isinstance(value, dict):
            return value
        if "$tensor" in value:
            device = place(value["device"]) if place else torch.device("cpu")
            return self._tensor_on(value["$tensor"], device)
        if "$float" in value:
            return float(value["$float"])
        if "$tuple" in value:
            return tuple(self.decode(item, place) for item in value["$tuple"])
        if "$dtype" in value:
            return getattr(torch, value["$dtype"])
        if "$dict" in value:
            return {self.decode(key): self.decode(item, place) for key, item in value["$dict"] if not _absent(item)}
        return {key: self.decode(item, place) for key, item in value.items() if not _absent(item)}

    def _tensor_on(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._given:
            self._given[name, device] = self._tensor(name).to(device)
        return self._given[name, device]


def _absent(value: Json) -> bool:
    return isinstance(value, dict) and "$absent" in value
