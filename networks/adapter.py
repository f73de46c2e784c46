"""The base of all adapters: a small trained module that changes what one frozen layer computes.

A type of adapter names its tensors and says what weight difference they stand for (`delta_weight`); with that alone it
can be attached, merged, saved and measured. A cheaper `combine` is what training runs. Types whose difference is a
product of two thin matrices say so with `factors`: resizing and merging with other networks then cost little.

Shape legend: B batch rows, T tokens, H W latent height and width, I input width, O output width, R rank, K kernel side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.log import UserError
from networks.network_args import Reader
from networks.recompute import recomputed


@dataclass(frozen=True, slots=True)
class Dropouts:
    """Probabilities, each 0 or more and less than 1; they act only in training.

    ``neuron``: elements of the rank activations; ``rank``: whole ranks per batch row; ``module``: whole adapters per
    step. Types without rank activations drop elements and whole channels of what they add to the output.
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
    """Names of the tensors that every module of a file has (``alpha`` may be absent)."""
    optional_names: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that some modules have besides."""
    prefix: ClassVar[str] = "lora"
    """What names of modules begin with in files."""
    has_own_files: ClassVar[bool] = True
    """False if its files are another type's: they are then read as that type, unless this one is asked for."""
    needs_weight: ClassVar[bool] = False
    """True if the weight difference depends on the layer's own weight."""
    alpha_scales: ClassVar[bool] = True
    """True if the difference is in proportion to alpha/rank."""
    plus_names: ClassVar[tuple[str, ...]] = ()
    """Tensors that start at zero and that LoRA+ gives a higher learning rate."""
    arguments: ClassVar[Mapping[str, Reader]] = {}
    """Arguments of ``--network_args`` that only this type has; they go to its constructor by name."""
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
        self._is_conv = isinstance(layer, nn.Conv2d)
        self._outer_forward: Callable[..., Tensor] | None = None
        self._restored_forward: Callable[..., Tensor] | None = None
        self._original: tuple[Tensor, Tensor | None] | None = None
        self._multiplier = multiplier
        self.register_buffer("alpha", torch.tensor(size.alpha or self.alpha_if_zero()))
        self.factor = 0.0
        self.refresh()
        self.register_load_state_dict_pre_hook(_fit_alpha)
        self.register_load_state_dict_pre_hook(_fit_flattened)
        self.register_load_state_dict_post_hook(_take_alpha)

    # ---- what a type defines

    @classmethod
    @abstractmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int:
        """Rank of an adapter's tensors in a file."""

    @classmethod
    @abstractmethod
    def layer_shape(cls, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """Weight shape, (O, I) or (O, I, K, K), of the layer that a file's tensors were made for.

        None if they do not tell. Of a 1x1 convolution it may be either form. Raises ValueError or IndexError for
        tensors that fit no layer.
        """

    @abstractmethod
    def start(self) -> None:
        """Draw the first values from torch's default generator; a started adapter changes nothing."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The weight difference at multiplier 1, in float32 and in the layer's weight shape."""

    def delta_bias(self) -> Tensor | None:
        """The difference of the layer's bias at multiplier 1; None if the adapter leaves it alone."""
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Thin matrices (O, R) and (R, I·K·K), float32, whose product is `delta_weight`; None if there are none."""
        return None

    def alpha_if_zero(self) -> float:
        """What alpha 0, or none at all in a file, stands for."""
        return float(self.rank)

    @classmethod
    def can_scale(cls) -> bool:
        """True if `scale_delta_` can be used."""
        return cls.scale_delta_ is not Adapter.scale_delta_

    def scale_delta_(self, ratio: Tensor) -> None:
        """Multiply the weight difference by a 0-dim tensor, in place. Raises UserError if the type cannot."""
        raise UserError(f"--scale_weight_norms: the norm of {type(self).__name__} cannot be limited; leave it out")

    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta_weight`, 0-dim."""
        return self.delta_weight().norm()

    def change(self, x: Tensor) -> Tensor:
        """What the difference adds to the layer's output for the input ``x`` at multiplier 1, after dropouts.

        Here by way of `delta_weight`, which is computed again in the backward pass instead of being kept.
        """
        return self._thinned(recomputed(self._change_by_weight, x, tuple(self.parameters())))

    def combine(self, y: Tensor, x: Tensor) -> Tensor:
        """The adapted output, from the layer's input ``x`` and its own output ``y``; here by way of `change`."""
        return y + self.change(x) * self._strength()

    def _change_by_weight(self, x: Tensor) -> Tensor:
        changed = self._operate(x, self.delta_weight().to(x.dtype))
        bias = self.delta_bias()
        if bias is None:
            return changed
        return changed + bias.to(x.dtype).view(-1, *(1,) * (changed.dim() - 2 if self._is_conv else 0))

    def _thinned(self, changed: Tensor) -> Tensor:
        """A change of the output, (B, ..., O) or (B, O, H, W), after neuron dropout and dropout of whole channels."""
        if not self.training or self.dropouts is NO_DROPOUT:
            return changed
        if self.dropouts.neuron:
            changed = F.dropout(changed, self.dropouts.neuron)
        if self.dropouts.rank:
            rows, width = changed.shape[0], changed.shape[1 if self._is_conv else -1]
            kept = torch.rand(rows, width, device=changed.device) > self.dropouts.rank
            spread = (rows, width, 1, 1) if self._is_conv else (rows, *(1,) * (changed.dim() - 2), width)
            changed = changed * kept.view(spread) / (1.0 - self.dropouts.rank)
        return changed

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that learn; the others are constants of this training."""
        return list(self.parameters())

    def plus_parameters(self) -> list[nn.Parameter]:
        """Those of the trained parameters that LoRA+ gives a higher learning rate."""
        learns = {id(parameter) for parameter in self.trained_parameters()}
        own = self.named_parameters()
        return [parameter for name, parameter in own if name in self.plus_names and id(parameter) in learns]

    def on_step(self) -> None:
        """Called before each forward pass of a training step, for types that draw something anew each time."""

    # ---- files

    @classmethod
    def fits(cls, names: Collection[str]) -> bool:
        """True if a module with these tensors is of this type."""
        known = {*cls.tensor_names, *cls.optional_names}
        return {*cls.tensor_names} - {"alpha"} <= {*names} <= known

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> AdapterSize:
        """Rank and alpha of an adapter's tensors in a file; without alpha it is the rank."""
        alpha = tensors.get("alpha")
        return AdapterSize(cls.rank_of(tensors), 0.0 if alpha is None else float(alpha))

    @classmethod
    def for_tensors(
        cls,
        name: str,
        layer: nn.Module,
        tensors: Mapping[str, Tensor],
        multiplier: float = 1.0,
        dropouts: Dropouts = NO_DROPOUT,
    ) -> Adapter:
        """An adapter that these tensors of a file fit into; they are not loaded yet."""
        return cls(name, layer, cls.size_of(tensors), multiplier, dropouts, **cls.structure_of(tensors))

    @classmethod
    def structure_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The type's own constructor arguments that make an adapter for these tensors of a file."""
        return {}

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
    def is_innermost(self) -> bool:
        """True if nothing else stood between this adapter and the layer's own forward when it was attached."""
        return self._restored_forward is None

    def _operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation with another weight and no bias."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore[reportArgumentType]
        return F.linear(x, weight)

    # ---- merging

    def backup(self) -> None:
        """Keep a copy of the layer's weight and bias as they are now, unless there is one."""
        if self._original is None:
            bias = bias_of(self.layer)
            self._original = weight_of(self.layer).detach().clone(), None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies of `backup` back, bit for bit."""
        if self._original is None:
            return
        weight, bias = self._original
        weight_of(self.layer).copy_(weight)
        if bias is not None:
            _require(bias_of(self.layer)).copy_(bias)

    @torch.no_grad()
    def add_to_layer(self, device: torch.device | str | None = None) -> None:
        """Add the difference to the layer's weight and bias: computed in float32 (on ``device``), rounded once."""
        weight, bias, of_bias = weight_of(self.layer), bias_of(self.layer), self.delta_bias()
        _add_rounded_once(weight, self.delta_weight(), self._multiplier, device)
        if bias is not None and of_bias is not None:
            _add_rounded_once(bias, of_bias, self._multiplier, device)

    def merge(self) -> None:
        """Fold the adapter into the layer's weight and switch its forward part off.

        `backup` of all adapters of the layer comes first: `unmerge` puts back what was there then.
        """
        self.add_to_layer()
        self.enabled = False

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit. Adapters merged into one layer come out in reverse order."""
        self.restore()
        self.enabled = True


def _fit_alpha(adapter: Adapter, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Files may lack alpha, hold 0 for "the rank", or a list of one number."""
    if not any(f"{prefix}{name}" in state_dict for name in (*adapter.tensor_names, *adapter.optional_names)):
        return
    given = state_dict.get(f"{prefix}alpha")
    alpha = 0.0 if given is None else float(given)
    state_dict[f"{prefix}alpha"] = torch.tensor(alpha or adapter.alpha_if_zero())


def _fit_flattened(adapter: Adapter, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Programs differ in whether (R, I, K, K) is written as (R, I·K·K), and a vector (O,) as (O, 1) or (O, 1, 1, 1)."""
    for name, parameter in adapter.named_parameters(recurse=False):
        given = state_dict.get(f"{prefix}{name}")
        if given is not None and given.shape[:1] == parameter.shape[:1] and given.numel() == parameter.numel():
            state_dict[f"{prefix}{name}"] = given.reshape(parameter.shape)


def _take_alpha(adapter: Adapter, _: Any) -> None:
    adapter.refresh()


def _add_rounded_once(target: Tensor, delta: Tensor, factor: float, device: torch.device | str | None) -> None:
    place = target.device if device is None else device
    delta = delta.to(place)
    target.copy_(target.to(place, delta.dtype).add_(delta, alpha=factor))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer. Raises TypeError if it has none."""
    return _require(layer.weight)


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a layer, if it has one."""
    bias = cast(object, layer.bias)
    return None if bias is None else _require(bias)


def _require(tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError("the layer has no weight tensor")
    return tensor
