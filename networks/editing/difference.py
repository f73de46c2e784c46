"""How two models of one architecture differ, tensor by tensor, and which part of a model each tensor belongs to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.checkpoint.keymap import same_matrix
from library.log import UserError
from library.models.spec import FAMILY_TITLES
from library.models.stream import OpenModel

WITHOUT_CONVOLUTIONS = "convolutions and ResNets (--conv_dim brings them in)"
QUIET_TEXT = "text encoder layers (below --min_diff)"
_TIME = ("time_embedding.", "add_embedding.", "class_embedding.")


def group_of(part: str, key: str) -> str:
    """What a tensor outside of a LoRA's reach is, in words. ``key``: canonical."""
    layer, _, leaf = key.rpartition(".")
    if part == "vae":
        return "VAE"
    if "norm" in layer.rpartition(".")[2]:
        return "norms"
    if leaf == "bias":
        return "biases"
    if part != "unet":
        if "embedding" in key:
            return "token and position embeddings"
        return "text projection" if "text_projection" in key else QUIET_TEXT
    if key.startswith(_TIME):
        return "time and size embeddings"
    return "first and last convolution" if layer in ("conv_in", "conv_out") else WITHOUT_CONVOLUTIONS


@dataclass
class Change:
    """Squared Frobenius norms of what differs, in the layers of the network and outside of it by group.

    ``lost`` is what the network lacks of ``inside``, ``best`` what one of its ranks could hold at most: exactly, or for
    ``bounded`` layers by a bound.
    ``incomparable`` counts tensors by group that only one model has, or of other shapes.
    """

    inside: float = 0.0
    lost: float = 0.0
    best: float = 0.0
    bounded: int = 0
    outside: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    layers_outside: Counter[str] = field(default_factory=Counter[str])
    incomparable: Counter[str] = field(default_factory=Counter[str])

    @property
    def total(self) -> float:
        """The whole change."""
        return self.inside + sum(self.outside.values())

    def add_outside(self, group: str, square: float) -> None:
        """Note a tensor that the network does not reach."""
        if square:
            self.outside[group] += square
            self.layers_outside[group] += 1

    def lines(self) -> list[str]:
        """The report. Shares are of the squares, so that they add up."""
        total = self.total
        if not total:
            return ["the models do not differ"]
        inside = self.inside or 1.0
        text = [
            f"norm of the whole change: {total**0.5:.4g}; {self.inside / total:.2%} of its square lies in the layers "
            f"of the network, which keeps {1 - self.lost / inside:.2%} of that (at most {self.best / inside:.2%} is "
            "possible with these ranks)",
            f"relative error of the weight change of these layers: {(self.lost / inside) ** 0.5:.2g}",
        ]
        text += [
            f"outside: {square / total:.2%} in {self.layers_outside[group]} tensors: {group}"
            for group, square in sorted(self.outside.items(), key=lambda item: -item[1])
        ]
        text += [f"not compared: {count} tensors: {group}" for group, count in self.incomparable.items()]
        return text


def check_same_kind(original: OpenModel, tuned: OpenModel) -> None:
    """Raise UserError for models of different families or widths."""
    a, b = original.found.spec, tuned.found.spec
    if a.family != b.family:
        raise UserError(
            f"--model_org {original.path} is {FAMILY_TITLES[a.family]}, --model_tuned {tuned.path} is "
            f"{FAMILY_TITLES[b.family]}: only models of one kind can be compared"
        )
    if (a.unet.widths, a.unet.depths) != (b.unet.widths, b.unet.depths):
        raise UserError(
            f"--model_tuned {tuned.path}: its U-Net has widths {b.unet.widths} and depths {b.unet.depths}, that of "
            f"{original.path} {a.unet.widths} and {a.unet.depths}"
        )


@dataclass(frozen=True)
class Comparison:
    """Two open models and the type to which weights are rounded before they are compared (None: as they are)."""

    original: OpenModel
    tuned: OpenModel
    load_dtype: torch.dtype | None = None

    def keys(self) -> Iterator[tuple[str, str]]:
        """(part, canonical key) of all tensors of either model, in the order of the original one."""
        for part in dict.fromkeys((*self.original.parts, *self.tuned.parts)):
            own, other = self.original.parts.get(part, {}), self.tuned.parts.get(part, {})
            yield from ((part, key) for key in dict.fromkeys((*own, *other)))

    def shape(self, part: str, key: str) -> tuple[int, ...]:
        """Shape of a tensor of the original model."""
        return self.original.parts[part][key].shape

    def can_compare(self, part: str, key: str) -> bool:
        """True if both models have the tensor in one shape (a 1x1 kernel counts as its matrix)."""
        pair = [model.parts.get(part, {}).get(key) for model in (self.original, self.tuned)]
        first, second = pair
        return first is not None and second is not None and same_matrix(first.shape, second.shape)

    def delta(self, part: str, key: str) -> Tensor:
        """Tuned minus original, float32, in the original's shape."""
        first, second = (model.parts[part][key].read() for model in (self.original, self.tuned))
        a, b = (tensor.to(self.load_dtype or tensor.dtype).float() for tensor in (first, second))
        return b.reshape(a.shape) - a


def square_of(delta: Tensor) -> float:
    """Squared Frobenius norm, added up in float64."""
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
