"""Where the layers of a U-Net stand: in memory, as diffusers builds it, and in Stability files.

Both come from the rows of the key tables and from the structure of the U-Net at hand, so any width will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from library.checkpoint.sd_keys import unet_rows
from library.models.spec import UNetSpec


@dataclass(frozen=True, slots=True)
class LayerPath:
    """One layer with weights. ``file`` is its path below ``model.diffusion_model.``, ``memory`` that in diffusers."""

    file: str
    memory: str

    @property
    def is_norm(self) -> bool:
        """True for normalisations: their weights are vectors."""
        return "norm" in self.memory.rpartition(".")[2]


def layer_paths(spec: UNetSpec) -> tuple[LayerPath, ...]:
    """All layers of a U-Net in the order of a file."""
    end = ".weight"
    return tuple(
        LayerPath(file.removesuffix(end), memory.removesuffix(end))
        for file, memory, _ in unet_rows(spec)
        if file.endswith(end)
    )


def has_file_paths(unet: nn.Module) -> bool:
    """True if the module's own paths are those of a Stability file."""
    return any(name == "input_blocks" for name, _ in unet.named_children())


def takes_sizes(unet: nn.Module) -> bool:
    """True for SDXL's kind of U-Net, which is also told pooled text and picture sizes."""
    names = {name for name, _ in unet.named_children()}
    return bool(names & {"add_embedding", "label_emb"})


def structure_of(unet: nn.Module) -> UNetSpec | None:
    """Levels, depths and widths of a U-Net with either kind of paths; the rest of the answer is the standard's.

    None if it has no down blocks that could be read: another kind of model.
    """
    modules = dict(unet.named_modules())
    places = _file_places(modules) if has_file_paths(unet) else _memory_places(modules)
    if not places:
        return None
    middle = "middle_block.1" if has_file_paths(unet) else "mid_block.attentions.0"
    widths = tuple(_width(modules, level[0].width_layer) for level in places)
    return UNetSpec(
        widths=widths,
        depths=tuple(_depth(modules, level[0].transformer) for level in places),
        heads=(1,) * len(places),
        mid_depth=_depth(modules, middle),
        layers_per_level=len(places[0]),
        vector_width=0 if takes_sizes(unet) else None,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A ResNet of the down half: its first convolution, and the transformer that may follow it."""

    width_layer: str
    transformer: str


Modules = Mapping[str, nn.Module]


def _memory_places(modules: Modules) -> list[list[_Place]]:
    def of(level: int) -> list[_Place]:
        block = f"down_blocks.{level}"
        count = _count(modules, f"{block}.resnets")
        return [_Place(f"{block}.resnets.{i}.conv1", f"{block}.attentions.{i}") for i in range(count)]

    found = [of(level) for level in range(_count(modules, "down_blocks"))]
    return found if all(found) else []


def _file_places(modules: Modules) -> list[list[_Place]]:
    levels: list[list[_Place]] = [[]]
    for index in range(1, _count(modules, "input_blocks")):
        block = f"input_blocks.{index}"
        if f"{block}.0.op" in modules:  # a downsampler ends the level
            levels.append([])
        else:
            levels[-1].append(_Place(f"{block}.0.in_layers.2", f"{block}.1"))
    return levels if all(levels) else []


def _count(modules: Modules, path: str) -> int:
    return len(list(modules[path].children())) if path in modules else 0


def _depth(modules: Modules, transformer: str) -> int:
    return _count(modules, f"{transformer}.transformer_blocks")


def _width(modules: Modules, path: str) -> int:
    layer = modules.get(path)
    return layer.out_channels if isinstance(layer, nn.Conv2d) else 0
