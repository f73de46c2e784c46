"""Deep Shrink: early steps are taken with a smaller picture inside the U-Net.

While the timestep is high, what enters one block of the encoder is made smaller; the decoder makes it fit the skip
connections again. So a picture larger than those of the training gets the composition of a small one. Hooks on the
blocks do it; they are gone after the batch.

Shapes: B pictures, C channels, H W height and width of a block's cells.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoint.unet_paths import layer_paths, structure_of, takes_sizes
from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.generation.jobs import DeepShrink

logger = logging.getLogger(__name__)


def attach_deep_shrink(engine: Engine) -> None:
    """Let the jobs' Deep Shrink work in this engine."""
    engine.extensions.append(deep_shrink)


@contextmanager
def deep_shrink(setup: Setup) -> Generator[None]:
    """An extension: shrink in the model calls of one batch."""
    plan = setup.batch[0].shared.deep_shrink
    if plan is None:
        yield
        return
    unet = setup.unet.unet
    shrinking, inner = Shrinking(plan, places_of(unet)), setup.predict

    def predict(latents_BCHW: Tensor, timestep: Tensor, call: int) -> Tensor:
        shrinking.depth = shrinking.depth_at(float(timestep))
        return inner(latents_BCHW, timestep, call)

    setup.predict = predict
    with shrinking.hooked(unet):
        yield


def places_of(unet: nn.Module) -> dict[int, str]:
    """The module that each depth stands before. SD1 and SD2 count down blocks, SDXL the input blocks of a file."""
    spec = structure_of(unet)
    if spec is None:
        return {}
    if not takes_sizes(unet):
        return {level: f"down_blocks.{level}.resnets.0" for level in range(len(spec.widths))}
    places: dict[int, str] = {}
    for path in layer_paths(spec):
        name, _, rest = path.file.partition(".")
        if name == "input_blocks":
            places.setdefault(int(rest.split(".")[0]), path.memory)
    return {depth: memory if memory == "conv_in" else memory.rpartition(".")[0] for depth, memory in places.items()}


def resized(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, computed in float32; the same tensor if it has the size."""
    if tuple(x_BCHW.shape[-2:]) == size:
        return x_BCHW
    return F.interpolate(x_BCHW.float(), size, mode="bicubic", align_corners=False).to(x_BCHW.dtype)


@dataclass
class Shrinking:
    """The hooks of one batch. ``depth``: before which place the current model call shrinks; None: not at all.

    Residuals of a ControlNet are taken from the U-Net's arguments and added where the sizes are known.
    """

    plan: DeepShrink
    places: Mapping[int, str]
    depth: int | None = None
    _full: tuple[int, int] = (0, 0)
    _residuals: list[Tensor] = field(default_factory=list[Tensor])
    _middle: Tensor | None = None
    _skips: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def __post_init__(self) -> None:
        for depth in self._depths():
            if depth not in self.places:
                logger.warning("Deep Shrink: this model has no depth %s, only 0 to %d", depth, len(self.places) - 1)

    def _depths(self) -> set[int]:
        return {depth for depth in (self.plan.depth_1, self.plan.depth_2) if depth is not None}

    def depth_at(self, timestep: float) -> int | None:
        """Which depth shrinks at a timestep."""
        if timestep >= self.plan.timesteps_1:
            depth = self.plan.depth_1
        else:
            depth = self.plan.depth_2 if timestep >= self.plan.timesteps_2 else None
        return depth if depth in self.places else None

    @contextmanager
    def hooked(self, unet: nn.Module) -> Generator[None]:
        """Hooks on the blocks of a U-Net, taken away at the end."""
        modules = dict(unet.named_modules())
        with ExitStack() as stack:

            def add(handle: Any) -> None:
                stack.callback(handle.remove)

            add(unet.register_forward_pre_hook(self._before_all, with_kwargs=True))
            for depth in self._depths() & self.places.keys():
                add(modules[self.places[depth]].register_forward_pre_hook(self._shrink_at(depth)))
            add(modules["mid_block"].register_forward_hook(self._after_middle))
            for name, block in unet.get_submodule("up_blocks").named_children():
                path = f"up_blocks.{name}"
                add(block.register_forward_pre_hook(self._before_up, with_kwargs=True))
                part = "attentions" if f"{path}.attentions" in modules else "resnets"
                for index, layer in enumerate(modules[f"{path}.{part}"].children()):
                    add(layer.register_forward_hook(self._grow_after(index)))
            add(modules["conv_norm_out"].register_forward_pre_hook(self._before_end))
            yield

    def _before_all(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._full = tuple(args[0].shape[-2:])
        if self.depth is None:
            return None
        kwargs = {**kwargs}
        self._residuals = list(kwargs.pop("down_block_additional_residuals", None) or ())
        self._middle = kwargs.pop("mid_block_additional_residual", None)
        return args, kwargs

    def _shrink_at(self, depth: int) -> Any:
        def shrink(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if self.depth != depth:
                return None
            height, width = (max(1, int(side * self.plan.ratio)) for side in args[0].shape[-2:])
            return resized(args[0], (height, width)), *args[1:]

        return shrink

    def _after_middle(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.depth is None or self._middle is None:
            return None
        return output + resized(self._middle, _size(output))

    def _before_up(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.depth is None:
            return None
        skips: list[Tensor] = list(kwargs["res_hidden_states_tuple"])
        if self._residuals:
            added, self._residuals = self._residuals[-len(skips) :], self._residuals[: -len(skips)]
            skips = [skip + resized(more, _size(skip)) for skip, more in zip(skips, added, strict=True)]
        self._skips = [_size(skip) for skip in reversed(skips)]
        hidden_BCHW = resized(kwargs["hidden_states"], self._skips[0])
        return args, {**kwargs, "res_hidden_states_tuple": tuple(skips), "hidden_states": hidden_BCHW}

    def _grow_after(self, index: int) -> Any:
        """After the layer of the skip connection of this index: the next one may be larger."""

        def grow(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.depth is None or index + 1 >= len(self._skips):
                return None
            if isinstance(output, torch.Tensor):
                return resized(output, self._skips[index + 1])
            return resized(output[0], self._skips[index + 1]), *output[1:]

        return grow

    def _before_end(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        return None if self.depth is None else (resized(args[0], self._full), *args[1:])


def _size(x_BCHW: Tensor) -> tuple[int, int]:
    height, width = x_BCHW.shape[-2:]
    return height, width
