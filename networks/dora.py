"""DoRA: the adapted weight is split into magnitudes and directions, and the magnitudes are trained on their own.

W' = m · V / ‖V‖ with V = W + ΔW, S.-Y. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353,
eq. 5. As in section 4.3 (eq. 11), ‖V‖ is a constant for the gradient. ΔW is that of another type: `Decomposed` stands
before it in the bases of a class. At another multiplier than 1 the weight is W + multiplier · (W' - W).

There is one magnitude per output channel, as in the paper's code and in PEFT, or per input channel, as in older files
of LyCORIS; the shape of the tensor ``dora_scale``, (O, 1, ...) or (1, I, ...), tells which.

With g = m / ‖V‖, the output that the layer itself gave is scaled and the change added: for magnitudes per output
y' = y + (g - 1) ∘ (y - bias) + g ∘ ΔW x; per input y' = y + W ((g - 1) ∘ x) + ΔW (g ∘ x). No weight is ever rebuilt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from networks.adapter import NO_DROPOUT, Adapter, AdapterSize, Dropouts
from networks.network_args import Reader, truth

_SMALLEST_NORM = 1e-12  # rows of zeros stay zero instead of becoming NaN


class Decomposed(Adapter):
    """To be put before an adapter type: ``class DoraX(Decomposed, X)``."""

    needs_weight: ClassVar[bool] = True
    alpha_scales: ClassVar[bool] = False
    arguments: ClassVar[Mapping[str, Reader]] = {"wd_on_output": truth}

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        size: AdapterSize,
        multiplier: float = 1.0,
        dropouts: Dropouts = NO_DROPOUT,
        wd_on_output: bool = True,
        **own: Any,
    ) -> None:
        super().__init__(name, layer, size, multiplier, dropouts, **own)
        shape = cast(Tensor, layer.weight).shape
        ones = (1,) * (len(shape) - 2)
        self.is_per_output = wd_on_output
        self.dora_scale = nn.Parameter(torch.zeros((shape[0], 1, *ones) if wd_on_output else (1, shape[1], *ones)))
        self._untrained: Tensor | None = None
        self._squares: tuple[tuple[object, ...], Tensor] | None = None
        self.register_load_state_dict_post_hook(_take_magnitudes)

    @classmethod
    def structure_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        shape = tensors["dora_scale"].shape
        is_per_input = len(shape) > 1 and shape[0] == 1 and shape[1] > 1
        return {**super().structure_of(tensors), "wd_on_output": not is_per_input}

    def start(self) -> None:
        super().start()
        with torch.no_grad():
            self.dora_scale.copy_(self._norms(self._base_weight()))
        self._untrained = self.dora_scale.detach().cpu().clone()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        exact = self.dora_scale.detach().float()
        result = super()._apply(*args, **kwargs)
        if self.dora_scale.dtype is not torch.float32:
            # in bfloat16 the magnitudes would be wrong by up to 0.4 %, each for its whole row
            self.dora_scale.data = exact.to(self.dora_scale.device)
        return result

    # ---- norms

    def magnitudes(self) -> Tensor:
        """The trained ``dora_scale``; as long as it is untrained, the norms of the weight as it is now."""
        if self._untrained is not None:
            self._follow_weight()
        return cast(Tensor, self._parameters["dora_scale"])

    @torch.no_grad()
    def _follow_weight(self) -> None:
        """Between creation and first use the model may have been cast or moved, which changes the last bits of norms.

        Magnitudes that are not exactly those of the weight would make a new adapter change the output.
        """
        untrained, self._untrained = self._untrained, None
        if untrained is not None and torch.equal(self.dora_scale.detach().cpu(), untrained):
            self.dora_scale.copy_(self._norms(self._base_weight()))
            if not self.training:
                self._untrained = self.dora_scale.detach().cpu().clone()

    def direction_norms(self) -> Tensor:
        """‖W + ΔW‖ per channel in the shape of ``dora_scale``, float32 and without gradient."""
        with torch.no_grad():
            return self._norms(self._base_weight() + super().delta_weight())

    def own_squares(self) -> tuple[Tensor, Tensor]:
        """The layer's weight as a matrix (O, I·K·K), and its ‖W‖² per channel in the shape of ``dora_scale``."""
        weight = cast(Tensor, self.layer.weight)
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._squares is None or self._squares[0] != state:
            self._squares = state, self._norm_squares(weight.detach().float())
        matrix_OI = weight.detach().flatten(1)
        return matrix_OI if matrix_OI.element_size() > 1 else matrix_OI.float(), self._squares[1]

    def _base_weight(self) -> Tensor:
        """The weight that is decomposed: without other adapters that were merged into it after the backup."""
        weight = cast(Tensor, self.layer.weight) if self._original is None else self._original[0]
        return weight.detach().to(self.dora_scale.device, torch.float32)

    def _norms(self, weight: Tensor) -> Tensor:
        return self._norm_squares(weight).sqrt()

    def _norm_squares(self, weight: Tensor) -> Tensor:
        # one memory layout, so that equal weights have bit-equal norms
        summed = (*range(1, weight.dim()),) if self.is_per_output else (0, *range(2, weight.dim()))
        return weight.contiguous().square().sum(summed, keepdim=True)

    # ---- what it does

    def delta_weight(self) -> Tensor:
        base = self._base_weight()
        direction = base + super().delta_weight()
        norms = self._norms(direction.detach()).clamp(min=_SMALLEST_NORM)
        return direction * (self.magnitudes() / norms) - base

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None

    def delta_norm(self) -> Tensor:
        return self.delta_weight().norm()

    scale_delta_ = Adapter.scale_delta_  # the change is not in proportion to any tensor

    def combine(self, y: Tensor, x: Tensor) -> Tensor:
        magnitudes, norms = self.magnitudes(), self.direction_norms().clamp(min=_SMALLEST_NORM)
        layer, strength = self.layer, self._strength()
        if self.is_per_output and self.is_innermost:
            changed = self.change(x)
            bias = cast(Tensor | None, layer.bias)
            return cast(Tensor, _AddDecomposed.apply(y, changed, magnitudes, norms, bias, strength, self._is_conv))
        weight = cast(Tensor, layer.weight).to(x.dtype)
        shape = (1, -1, 1, 1) if self._is_conv else (-1,)
        gain = (magnitudes / norms).view(shape)
        less = (gain - 1.0).to(x.dtype)  # subtracted in float32: 1 plus little is 1 in bfloat16
        if self.is_per_output:  # y has other adapters in it: the layer's own output is needed once more
            changed = self._operate(x, weight) * less + self.change(x) * gain.to(x.dtype)
        else:
            changed = self._operate(x * less, weight) + self.change(x * gain.to(x.dtype))
        return y + changed * strength


def _take_magnitudes(adapter: Decomposed, _: Any) -> None:
    adapter._untrained = None  # pyright: ignore[reportPrivateUsage]


class _AddDecomposed(torch.autograd.Function):
    """out = y + a ∘ (y - bias) + c ∘ change, with c = strength · m / ‖V‖ and a = c - strength, per output channel.

    For the gradient of m, Σ strength/‖V‖ · ((y - bias) + change) · grad, the sum in parentheses is found from the
    output, (out - bias + (1 - strength) change) / (1 + a): most outputs are kept by what reads them, while y is not.
    """

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        y: Tensor,
        change: Tensor,
        m: Tensor,
        norms: Tensor,
        bias: Tensor | None,
        strength: float,
        is_conv: bool,
    ) -> Tensor:
        spread = (-1, 1, 1) if is_conv else (-1,)
        c = strength * m / norms
        a, bias = (c - strength).view(spread), None if bias is None else bias.detach().to(y.dtype).view(spread)
        own = y if bias is None else y - bias
        out = torch.addcmul(torch.addcmul(y, own, a.to(y.dtype)), change.to(y.dtype), c.view(spread).to(y.dtype))
        ctx.save_for_backward(out, change if strength != 1.0 else None, a, c.view(spread), norms, bias)
        ctx.strength, ctx.is_conv = strength, is_conv
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        out, change, a, c, norms, bias = ctx.saved_tensors
        own = out if bias is None else out - bias
        if change is not None:
            own = own + change * (1.0 - ctx.strength)
        summed = (0, 2, 3) if ctx.is_conv else (*range(grad.dim() - 1),)
        of_m = (own * grad).sum(summed, dtype=torch.float32).view(norms.shape)
        share = (1.0 + a).view(norms.shape)
        # where a channel is switched off altogether, the direction cannot be told from the output
        of_m = torch.where(share.abs() > 1e-6, of_m / share, 0.0) * (ctx.strength / norms)
        of_y = torch.addcmul(grad, grad, a.to(grad.dtype))
        return of_y, grad * c.to(grad.dtype), of_m, None, None, None, None
