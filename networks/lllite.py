"""ControlNet-LLLite (kohya): small networks that change what attention layers of SDXL's U-Net get, after a picture.

Each adapted layer has its own network: the picture goes through convolutions to the layer's resolution, what the layer
gets goes through ``down``, both through ``mid``, and ``up`` gives what is added to the layer's input. ``up`` begins at
zero, weight and bias, so a fresh network changes nothing.

Shapes: B pictures, K copies of them in the U-Net's batch (guidance), H W height and width of a layer's places,
N = H·W places, I input width of the layer, E width of the picture's features, M inner width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from library.checkpoint.io import open_model_file, save_pickle, save_safetensors
from library.checkpoint.keymap import raise_key_problems
from library.checkpoint.unet_paths import layer_paths, structure_of, takes_sizes
from library.log import UserError

PREFIX = "lllite_unet_"
DEFAULT_COND_WIDTH, DEFAULT_INNER_WIDTH = 32, 64
_ADAPTED = re.compile(r"\.(?:attn1\.to_[qkv]|attn2\.to_q)$")
_BLOCK = re.compile(r"^(?:input_blocks\.(?P<number>\d+)|middle_block)\.")


@dataclass(frozen=True, slots=True)
class LLLiteSize:
    """``cond_width`` E (even) and ``inner_width`` M: cond_emb_dim and network_dim of the training script."""

    cond_width: int = DEFAULT_COND_WIDTH
    inner_width: int = DEFAULT_INNER_WIDTH


@dataclass
class _Place:
    """Where a transformer is at work: the height and width of its places in the present call."""

    size_hw: tuple[int, int] = (0, 0)


class LLLiteModule(nn.Module):
    """The network of one layer. Its tensors are named as in files."""

    def __init__(self, depth: int, input_width: int, size: LLLiteSize, dropout: float = 0.0) -> None:
        super().__init__()
        self.conditioning1 = _picture_layers(depth, size.cond_width)
        self.down = nn.Sequential(nn.Linear(input_width, size.inner_width), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(size.inner_width + size.cond_width, size.inner_width), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(size.inner_width, input_width))
        self.dropout = dropout
        nn.init.zeros_(cast(nn.Linear, self.up[0]).weight)
        nn.init.zeros_(cast(nn.Linear, self.up[0]).bias)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The picture's share of ``mid`` (B, M, H, W), for pictures in -1..1.

        ``mid`` is linear in (picture, input) before its ReLU, so this half of it is computed once per picture.
        """
        mid = cast(nn.Linear, self.mid[0])
        picture_BEHW = self.conditioning1(images_BCHW)
        kernel_ME11 = mid.weight[:, : picture_BEHW.shape[1], None, None]
        return F.conv2d(picture_BEHW, kernel_ME11, mid.bias)

    def forward(self, input_BNI: Tensor, features_BNM: Tensor) -> Tensor:
        """What is added to the layer's input."""
        mid = cast(nn.Linear, self.mid[0])
        inner_BNM = self.down(input_BNI)
        inner_BNM = F.relu(F.linear(inner_BNM, mid.weight[:, -inner_BNM.shape[-1] :]) + features_BNM)
        return self.up(F.dropout(inner_BNM, self.dropout, self.training))


def _picture_layers(depth: int, width: int) -> nn.Sequential:
    """Convolutions from pixels to the resolution of a layer: 8, 16 or 32 times smaller for depth 1, 2, 3."""
    half = width // 2
    first = nn.Conv2d(3, half, kernel_size=4, stride=4)
    if depth == 1:
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(half, width, kernel_size=2, stride=2))
    if depth == 2:
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(half, width, kernel_size=4, stride=4))
    between = nn.Conv2d(half, half, kernel_size=4, stride=4)
    return nn.Sequential(first, nn.ReLU(), between, nn.ReLU(), nn.Conv2d(half, width, kernel_size=2, stride=2))


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    layer: nn.Linear
    transformer: str
    depth: int


def _targets(unet: nn.Module) -> list[_Target]:
    """Query, key and value of self-attention and query of cross-attention, in the input and middle blocks."""
    spec = structure_of(unet)
    if spec is None or not takes_sizes(unet):
        raise UserError("ControlNet-LLLite is for SDXL only; this is another kind of model")
    found: list[_Target] = []
    for path in layer_paths(spec):
        block = _BLOCK.match(path.file)
        if block is None or not _ADAPTED.search(path.file):
            continue
        number = int(block["number"]) if block["number"] else None
        depth = 3 if number is None or number > 5 else 2 if number > 2 else 1
        layer = cast(nn.Linear, unet.get_submodule(path.memory))
        transformer = path.memory.partition(".transformer_blocks.")[0]
        found.append(_Target(PREFIX + path.file.replace(".", "_"), layer, transformer, depth))
    return found


class ControlNetLLLite(nn.Module):
    """All networks of a U-Net; its state dict has the keys of a file. The U-Net itself is no part of it.

    ``multiplier`` is the strength; at 0, or without a picture, the U-Net works as if nothing were attached.
    ``recomputes``: what is made of a picture at its larger sizes is made again in the backward pass, not kept for it.
    """

    def __init__(self, unet: nn.Module, size: LLLiteSize | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.multiplier = 1.0
        self.recomputes = False
        self.size = size or LLLiteSize()
        self._unet = (unet,)  # the tuple hides it from nn.Module
        self._targets = _targets(unet)
        self._features: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for target in self._targets:
            width = target.layer.in_features
            self.add_module(target.name, LLLiteModule(target.depth, width, self.size, dropout))

    def set_condition(self, images_BCHW: Tensor | None) -> None:
        """The pictures (B, 3, pixels, pixels) in -1..1 for the coming calls of the U-Net; None: none.

        Where gradients are recorded they reach the convolutions that read the pictures.
        """
        self._features = {}
        if images_BCHW is None:
            return
        weight = next(self.parameters())
        images_BCHW = images_BCHW.to(weight.device, weight.dtype)
        for name, module in self._modules_by_name():
            if self.recomputes and torch.is_grad_enabled():
                self._features[name] = checkpoint(module.features, images_BCHW, use_reentrant=False)
            else:
                self._features[name] = module.features(images_BCHW)

    def attach(self) -> None:
        """Take part in the U-Net's calls. Of several networks the last attached one is the first to change an input."""
        (unet,) = self._unet
        places = {target.transformer: _Place() for target in self._targets}
        for path, place in places.items():
            self._hooks.append(unet.get_submodule(path).register_forward_pre_hook(_noting(place)))
        for target in self._targets:
            hook = self._changing(target.name, places[target.transformer])
            self._hooks.append(target.layer.register_forward_pre_hook(hook, prepend=True))

    def detach(self) -> None:
        """Leave the U-Net as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _modules_by_name(self) -> list[tuple[str, LLLiteModule]]:
        return [(name, cast(LLLiteModule, module)) for name, module in self.named_children()]

    def _changing(self, name: str, place: _Place) -> Any:
        module = cast(LLLiteModule, self.get_submodule(name))

        def change(_: nn.Module, args: tuple[Any, ...]) -> Any:
            features_BMHW = self._features.get(name)
            if features_BMHW is None or self.multiplier == 0:
                return None
            input_BNI: Tensor = args[0]
            added_BNI = module(input_BNI, _fitted(features_BMHW, place.size_hw, len(input_BNI)))
            return input_BNI + added_BNI * self.multiplier, *args[1:]

        return change

    # ---- files

    def load_weights(self, file: str | Path) -> None:
        """Take the tensors of a file, all of them. Raises UserError if the file does not fit."""
        with open_model_file(file) as opened:
            state = {key: opened.tensor(key) for key in opened.infos}
        own = self.state_dict()
        raise_key_problems(sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()), str(file))
        wrong = [key for key, tensor in state.items() if tensor.shape != own[key].shape]
        if wrong:
            shapes = f"{tuple(state[wrong[0]].shape)} where {tuple(own[wrong[0]].shape)} belongs"
            raise UserError(f"{file}: {len(wrong)} tensors have a wrong shape: {wrong[0]}: {shapes}")
        self.load_state_dict(state)

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, or by the extensions .ckpt and .pt a pickled state dict, which has no place for
        metadata. Floating point tensors are cast to ``dtype`` (None: as they are).
        """
        if Path(file).suffix.lower() in (".ckpt", ".pt"):
            save_pickle(file, self.state_dict(), dtype)
        else:
            save_safetensors(file, self.state_dict(), metadata, dtype)


def _noting(place: _Place) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        place.size_hw = tuple(args[0].shape[-2:])

    return note


def _fitted(features_BMHW: Tensor, size_hw: tuple[int, int], rows: int) -> Tensor:
    """Features of the places of a layer (K·B, N, M): resized where the latents are not at their full size."""
    if tuple(features_BMHW.shape[-2:]) != size_hw:
        resized = F.interpolate(features_BMHW.float(), size_hw, mode="bilinear", antialias=True)
        features_BMHW = resized.to(features_BMHW.dtype)
    copies, rest = divmod(rows, len(features_BMHW))
    if rest:
        raise ValueError(f"{rows} rows for {len(features_BMHW)} guide pictures")
    return features_BMHW.flatten(2).transpose(1, 2).repeat(copies, 1, 1)


def load_lllite(path: str | Path, unet: nn.Module) -> ControlNetLLLite:
    """The network of a file for a U-Net, frozen, not yet attached. Its widths come from the file. Raises UserError."""
    network = ControlNetLLLite(unet, size_of_file(path))
    network.load_weights(path)
    return network.eval().requires_grad_(False)


def create_lllite(
    unet: nn.Module,
    cond_width: int | None = None,
    inner_width: int | None = None,
    dropout: float | None = None,
    weights: str | Path | None = None,
) -> ControlNetLLLite:
    """A network to be trained for a U-Net, not yet attached; it begins as ``weights``, a file, if that is given.

    Widths that are not given are those of the file, else the usual ones. Raises UserError.
    """
    usual = LLLiteSize() if weights is None else size_of_file(weights)
    size = LLLiteSize(cond_width or usual.cond_width, inner_width or usual.inner_width)
    if weights is not None and size != usual:
        raise UserError(
            f"--network_weights {weights} has cond_emb_dim {usual.cond_width} and network_dim {usual.inner_width};"
            " leave these two options out, or begin without the file"
        )
    network = ControlNetLLLite(unet, size, dropout or 0.0)
    if weights is not None:
        network.load_weights(weights)
    return network


def inspect_weights(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the last layer of each network of a file, by the network's name: 0 if it changes nothing."""
    squares: dict[str, float] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        if rest.startswith("up.0."):
            squares[name] = squares.get(name, 0.0) + float(tensor.float().square().sum())
    return {name: square**0.5 for name, square in squares.items()}


def size_of_file(path: str | Path) -> LLLiteSize:
    """The widths of the network in a file. Raises UserError if there is none in it."""
    with open_model_file(path) as file:
        shapes = {key: info.shape for key, info in file.infos.items()}
    down = next((shape for key, shape in shapes.items() if key.endswith(".down.0.weight")), None)
    picture = next((shape for key, shape in shapes.items() if key.endswith(".conditioning1.0.weight")), None)
    if down is None or picture is None or not any(key.startswith(PREFIX) for key in shapes):
        raise UserError(f"{path} holds no ControlNet-LLLite weights (keys such as {PREFIX}....down.0.weight)")
    return LLLiteSize(2 * picture[0], down[0])
