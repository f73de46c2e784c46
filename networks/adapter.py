"""The base of all adapters: a small trained module that changes what one frozen layer computes.

A type of adapter names its tensors and says what weight difference they stand for (`delta_weight`); with that alone it
can be attached, merged, saved and measured. A cheaper `combine` is what training runs.

Shape legend: B batch rows, T tokens, H W latent height and width, I input width, O output width, R rank, K kernel side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Dropouts:
    """Probabilities, each 0 or more and less than 1; they act only in training.

    ``neuron``: elements of the rank activations; ``rank``: whole ranks per batch row; ``module``: whole adapters per
    step.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0


NO_DROPOUT = Dropouts()


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """Rank and alpha of one adapter; the effect is scaled by alpha/rank. Alpha 0 stands for the rank itself."""

    rank: int
    alpha: float


class Factor(nn.Module):
    """One trained tensor, ``weight`` in state dicts. Takes tensors that differ only in trailing 1s of the shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.register_load_state_dict_pre_hook(_fit_shape)

    @property
    def slot(self) -> dict[str, nn.Parameter | None]:
        """The module's own table, whose ``weight`` is always the present parameter: quick to read in a forward pass."""
        return self._parameters


def _fit_shape(factor: Factor, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    key = f"{prefix}weight"
    given = state_dict.get(key)
    if given is not None and _without_ones(given.shape) == _without_ones(factor.weight.shape):
        state_dict[key] = given.reshape(factor.weight.shape)


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    """(O, R, 1, 1) and (O, R) are the same matrix: SD2 files have either form for proj_in and proj_out."""
    return tuple(shape[:2]) + tuple(side for side in shape[2:] if side != 1)


class Adapter(nn.Module, ABC):
    """An adapter of one Linear or Conv2d layer. The layer is held, not registered: it is not saved or moved with it.

    ``multiplier`` is the strength asked for by the user; ``factor`` is what the raw product of the factors is
    multiplied with: multiplier · alpha / rank.
    """

    tensor_names: ClassVar[tuple[str, ...]]
    """Names of the tensors of one adapter in a file, in the order of the state dict."""
    alpha: Tensor

    def __init__(
        self, name: str, layer: nn.Module, size: AdapterSize, multiplier: float = 1.0, dropouts: Dropouts = NO_DROPOUT
    ) -> None:
        super().__init__()
        if size.rank < 1:
            raise ValueError(f"{name}: the rank must be at least 1, is {size.rank}")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"{name}: grouped convolutions cannot get an adapter")
        self.name = name
        self.rank = size.rank
        self.dropouts = dropouts
        self.enabled = True
        self.is_skipped = False
        self._layer = (layer,)  # the tuple hides it from nn.Module
        self._outer_forward: Callable[..., Tensor] | None = None
        self._original: Tensor | None = None
        self._multiplier = multiplier
        self.register_buffer("alpha", torch.tensor(float(size.alpha or size.rank)))
        self.factor = 0.0
        self.refresh()
        self.register_load_state_dict_pre_hook(_fit_alpha)
        self.register_load_state_dict_post_hook(_take_alpha)

    # ---- what a type defines

    @classmethod
    @abstractmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        """Rank of an adapter's tensors in a file."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The weight difference at multiplier 1, in float32 and in the layer's weight shape."""

    @abstractmethod
    def scale_delta_(self, ratio: Tensor) -> None:
        """Multiply the weight difference by a 0-dim tensor, in place."""

    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta_weight`, 0-dim."""
        return self.delta_weight().norm()

    def combine(self, y: Tensor, x: Tensor) -> Tensor:
        """The adapted output, from the layer's input ``x`` and its own output ``y``; here by way of `delta_weight`."""
        return y + self._operate(x, self.delta_weight().to(x.dtype)) * self._strength()

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> AdapterSize:
        """Rank and alpha of an adapter's tensors in a file; without alpha it is the rank."""
        alpha = tensors.get("alpha")
        return AdapterSize(cls.rank_of(tensors), 0.0 if alpha is None else float(alpha))

    # ---- strength

    @property
    def layer(self) -> nn.Module:
        """The layer that is adapted."""
        return self._layer[0]

    @property
    def scale(self) -> float:
        """alpha / rank, always that of the alpha that would be saved."""
        return float(self.alpha) / self.rank

    @property
    def multiplier(self) -> float:
        """Strength; 1 is as trained."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = value
        self.refresh()

    def refresh(self) -> None:
        """Take alpha's present value into the strength."""
        # a plain number, so that no forward pass reads a tensor of the device
        self.factor = self.scale * self._multiplier

    def _strength(self) -> float:
        return 0.0 if self.is_skipped else self._multiplier

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self.refresh()  # a cast may have rounded alpha
        return result

    # ---- hooking

    def attach(self) -> None:
        """Replace the layer's ``forward`` (on the instance), so that it returns the adapted output."""
        if self._outer_forward is not None:
            raise RuntimeError(f"{self.name} is attached already")
        layer = self.layer
        self._restored_forward = layer.__dict__.get("forward")
        inner: Callable[[Tensor], Tensor] = layer.forward
        combine = self.combine

        def forward(x: Tensor) -> Tensor:
            y = inner(x)
            return combine(y, x) if self.enabled else y

        self._outer_forward = forward
        layer.forward = forward

    def detach(self) -> None:
        """Undo `attach`. Adapters stacked on one layer come off in reverse order."""
        layer = self.layer
        if self._outer_forward is None:
            return
        if layer.__dict__.get("forward") is not self._outer_forward:
            raise RuntimeError(f"{self.name}: something else was attached later; take that off first")
        if self._restored_forward is None:
            del layer.forward
        else:
            layer.forward = self._restored_forward
        self._outer_forward = None

    @property
    def is_attached(self) -> bool:
        """True between `attach` and `detach`."""
        return self._outer_forward is not None

    def _operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation with another weight and no bias."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore[reportArgumentType]
        return F.linear(x, weight)

    # ---- merging

    def backup(self) -> None:
        """Keep a copy of the layer's weight as it is now, unless there is one."""
        if self._original is None:
            self._original = _weight_of(self.layer).detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy of `backup` back, bit for bit."""
        if self._original is not None:
            _weight_of(self.layer).copy_(self._original)

    @torch.no_grad()
    def add_to_layer(self, device: torch.device | str | None = None) -> None:
        """Add the weight difference to the layer's weight: computed in float32 (on ``device``), rounded once."""
        weight = _weight_of(self.layer)
        place = weight.device if device is None else device
        delta = self.delta_weight().to(place)
        weight.copy_(weight.to(place, delta.dtype).add_(delta, alpha=self._multiplier))

    def merge(self) -> None:
        """Fold the adapter into the layer's weight and switch its forward part off; `unmerge` undoes it exactly."""
        self.restore()
        self.backup()
        self.add_to_layer()
        self.enabled = False

    def unmerge(self) -> None:
        """Undo `merge`. Adapters merged into one layer come out in reverse order."""
        self.restore()
        self._original = None
        self.enabled = True


def _fit_alpha(adapter: Adapter, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Files may lack alpha, hold 0 for "the rank", or a list of one number."""
    if not any(f"{prefix}{name}" in state_dict for name in adapter.tensor_names):
        return
    given = state_dict.get(f"{prefix}alpha")
    alpha = 0.0 if given is None else float(given)
    state_dict[f"{prefix}alpha"] = torch.tensor(alpha or float(adapter.rank))


def _take_alpha(adapter: Adapter, _: Any) -> None:
    adapter.refresh()


def _weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight tensor")
    return weight
