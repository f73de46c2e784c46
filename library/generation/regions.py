"""Sub-prompts joined by AND, each in its own region of the picture, and networks that act in one region each.

A mask picture says where: its red, green and blue channel are the regions of the first three sub-prompts, or (with
colour codes) all pixels of exactly one colour are one region. Sub-prompts beyond that have the whole picture.

In a cross-attention layer each sub-prompt is attended to by itself, and the results are averaged with the masks as
weights. Network i changes the text of sub-prompt i, its keys and values, and elsewhere in the U-Net what lies in its
region. The negative prompt's and the empty prompt's texts are changed by no network.

Shapes: B pictures, K copies for guidance (negative prompts, prompts, empty prompts), P sub-prompts, H W mask or layer
height and width, N = H·W places of a layer, T tokens, D context width, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.data.images import UnreadableImage, read_image
from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.log import UserError

RGB_REGIONS = 3
_TRANSFORMER = re.compile(r"\.attentions\.\d+$")
_CROSS = ".attn2"
Role = Literal["place", "text", "output"]
"""Of a layer: what it computes belongs to places, to texts (keys and values), or to a sub-prompt seen at places."""


# ---- masks


def region_masks(pixels_HW3: np.ndarray, parts: int, color_codes: int | None = None) -> Tensor:
    """Regions of the sub-prompts (P, H, W) in 0..1 from 8-bit RGB.

    Without ``color_codes``: the three channels. With c of them: the first c regions are the pixels of exactly the
    colour whose bits are the region's number from 1 on (red 1, green 2, blue 4; 8 is black). The whole picture for what
    has no mask, and for an empty one.
    """
    pixels = torch.from_numpy(np.array(pixels_HW3, dtype=np.uint8))
    masks_PHW = torch.ones(parts, *pixels.shape[:2])
    masked = RGB_REGIONS if color_codes is None else color_codes
    for index in range(min(parts, masked)):
        if color_codes is None:
            mask_HW = pixels[..., index].float() / 255
        else:
            color = torch.tensor([255 * (index + 1 >> bit & 1) for bit in range(3)], dtype=torch.uint8)
            mask_HW = (pixels == color).all(dim=-1).float()
        if mask_HW.any():
            masks_PHW[index] = mask_HW
    return masks_PHW


def read_masks(path: str, parts: int, color_codes: int | None) -> Tensor:
    """`region_masks` of a file, at its own size, what is transparent taken as white. Raises UserError."""
    try:
        return region_masks(read_image(path), parts, color_codes)
    except (UnreadableImage, OSError) as error:
        raise UserError(f"--mask_path {error}; choose another picture") from error


def text_shares(masks_PBN: Tensor) -> Tensor:
    """How much each sub-prompt counts at each place (P, B, N): in proportion to the masks, together exactly 1.

    Where no mask lies, all count the same.
    """
    total_BN = masks_PBN.sum(dim=0)
    shares_PBN = masks_PBN / torch.where(total_BN > 0, total_BN, 1.0)
    return torch.where(total_BN > 0, shares_PBN, 1.0 / len(masks_PBN))


# ---- what is drawn now


@dataclass
class RegionalBatch:
    """A batch while it is drawn. ``contexts``: the text of each sub-prompt (B, T, D).

    ``place_hw`` is the size of the layers that are at work, ``part`` the sub-prompt whose text is attended to (None:
    one that has no region).
    """

    masks_PBHW: Tensor
    contexts: Sequence[Tensor]
    copies: int
    place_hw: tuple[int, int] = (1, 1)
    part: int | None = None
    _sized: dict[tuple[tuple[int, int], torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def prompts(self) -> slice:
        """The rows of the prompts among all K·B."""
        count = self.masks_PBHW.shape[1]
        return slice(0, count) if self.copies == 1 else slice(count, 2 * count)

    def masks_at(self, size_hw: tuple[int, int], like: Tensor) -> Tensor:
        """Masks (P, B, H, W) at a layer's height and width: edges become shares. Made once for each size."""
        key = (size_hw, like.dtype)
        if key not in self._sized:
            sized = F.interpolate(self.masks_PBHW, size_hw, mode="bilinear", antialias=True)
            self._sized[key] = sized.to(like.device, like.dtype)
        return self._sized[key]

    def mask_for(self, network: int, output: Tensor) -> Tensor:
        """The region of a network for the output of a layer: (K·B, C, H, W), (K·B, N, C) or (K·B, C).

        What has no places (embeddings of time) is changed by the region's share of the picture.
        """
        if output.dim() == 4:
            mask = self.masks_at((output.shape[2], output.shape[3]), output)[network][:, None]
        elif output.dim() == 3 and output.shape[1] == self.place_hw[0] * self.place_hw[1]:
            mask = self.masks_at(self.place_hw, output)[network].flatten(1)[:, :, None]
        else:
            mean_B = self.masks_PBHW[network].mean(dim=(1, 2)).to(output)
            mask = mean_B.view(-1, *[1] * (output.dim() - 1))
        return mask.repeat(self.copies, *[1] * (mask.dim() - 1))

    def masks_here(self, like: Tensor) -> Tensor:
        """Masks of the places that are at work (P, B, N)."""
        return self.masks_at(self.place_hw, like).flatten(2)


class Regions:
    """The seam between networks, attention and the batch that is drawn; without such a batch all is as usual."""

    def __init__(self, engine: Engine, color_codes: int | None) -> None:
        self._engine = engine
        self._color_codes = color_codes
        self._masks: dict[tuple[str, int], Tensor] = {}
        self.now: RegionalBatch | None = None

    # ---- networks

    @contextmanager
    def watch(self, network: int, file: str) -> Generator[None]:
        """Whatever layer is given another forward pass inside is kept to the region of this network.

        Raises UserError if there is none: such a network changes the model in a way that cannot be divided.
        """
        texts = [layer for encoder in self._engine.parts.text_encoders for layer in encoder.modules()]
        before = {layer: vars(layer).get("forward") for layer in texts}
        watched = [_Watched(path, layer) for path, layer in self._engine.parts.unet.named_modules() if _is_layer(layer)]
        yield
        changed = sum(vars(layer).get("forward") is not forward for layer, forward in before.items())
        changed += sum(entry.divide(self, network) for entry in watched)
        if not changed:
            raise UserError(
                f"--network_weights {file}: its module changes no layer's forward pass: not with --mask_path"
            )

    # ---- drawing

    @contextmanager
    def extension(self, setup: Setup) -> Generator[None]:
        """Draw a batch in regions; others are left alone."""
        shared = setup.batch[0].shared
        if not shared.regional:
            yield
            return
        texts = [([job.texts[part] for job in setup.batch], shared.for_text(part)) for part in range(shared.parts)]
        contexts = [condition.hidden_BTD for condition in self._engine.encode(*texts)]
        masks = [self._masks_of(job.mask, shared.parts, (shared.height, shared.width)) for job in setup.batch]
        masks_PBHW = torch.stack(masks, dim=1).to(self._engine.settings.device)
        self.now = RegionalBatch(masks_PBHW, contexts, setup.unet.guidance.copies)
        try:
            with ExitStack() as stack:
                self._hook(setup.unet.unet, stack)
                yield
        finally:
            self.now = None

    def _masks_of(self, path: str | None, parts: int, size_hw: tuple[int, int]) -> Tensor:
        """Masks (P, H, W) of a job in the picture's size, so that those of a batch can be stacked."""
        if path is None:
            return torch.ones(parts, *size_hw)
        key = (path, parts)
        if key not in self._masks:
            self._masks = {**dict(list(self._masks.items())[-15:]), key: read_masks(path, parts, self._color_codes)}
        masks_PHW = self._masks[key]
        return F.interpolate(masks_PHW[None], size_hw, mode="bilinear", antialias=True)[0]

    def _hook(self, unet: nn.Module, stack: ExitStack) -> None:
        """Tell the places of each transformer, and take over its cross-attention."""
        for path, module in unet.named_modules():
            if _TRANSFORMER.search(path):
                stack.callback(module.register_forward_pre_hook(self._enter_transformer).remove)
            elif path.endswith(_CROSS):
                block = cast(Any, module)
                stack.callback(block.set_processor, block.processor)
                block.set_processor(RegionalAttention(self))

    def _enter_transformer(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert self.now is not None
        self.now.place_hw = (inputs[0].shape[2], inputs[0].shape[3])


def attach_regions(engine: Engine, color_codes: int | None) -> Regions:
    """Let the engine draw regional jobs; networks that are attached later are divided by `Regions.watch`."""
    regions = Regions(engine, color_codes)
    engine.extensions.append(regions.extension)
    return regions


# ---- layers


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def role_of(path: str) -> Role:
    """What the layer at a path of the U-Net computes."""
    if path.endswith((f"{_CROSS}.to_k", f"{_CROSS}.to_v")):
        return "text"
    return "output" if path.endswith(f"{_CROSS}.to_out.0") else "place"


class _Watched:
    """A layer before and after a network is put on it."""

    def __init__(self, path: str, layer: nn.Module) -> None:
        self._layer = layer
        self._role = role_of(path)
        self._had = vars(layer).get("forward")
        self._inner: Callable[[Tensor], Tensor] = layer.forward
        self._plain: Tensor | None = None
        layer.forward = self._record
        self._recorder = layer.forward

    def _record(self, x: Tensor) -> Tensor:
        self._plain = self._inner(x)
        return self._plain

    def divide(self, regions: Regions, network: int) -> bool:
        """Keep what was put on the layer to the network's region; False, and all as before, if nothing was."""
        outer: Callable[[Tensor], Tensor] = self._layer.forward
        if outer is self._recorder:
            if self._had is None:
                del self._layer.forward
            else:
                self._layer.forward = self._had
            return False
        role = self._role

        def forward(x: Tensor) -> Tensor:
            batch = regions.now
            if batch is None:
                changed = outer(x)
                self._plain = None
                return changed
            if role != "place" and batch.part != network:
                return self._inner(x)
            changed = outer(x)
            if role == "text":
                self._plain = None
                return changed
            plain = self._inner(x) if self._plain is None else self._plain  # some networks never ask the layer
            self._plain = None
            if role == "place":
                return plain + batch.mask_for(network, plain) * (changed - plain)
            # the average divides by the sum of the masks; a network's part is not to be divided
            return plain + batch.masks_here(plain).sum(dim=0)[:, :, None] * (changed - plain)

        self._layer.forward = forward
        return True


class RegionalAttention:
    """Cross-attention in which each sub-prompt is read by itself, as a processor of diffusers' attention blocks."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        batch = self._regions.now
        assert batch is not None
        query_RNC = attn.to_q(hidden_states)
        rows = batch.prompts
        batch.part = None
        output_RNC = torch.empty_like(hidden_states)
        for others in (slice(0, rows.start), slice(rows.stop, len(query_RNC))):
            if others.stop > others.start:
                output_RNC[others] = _read(attn, query_RNC[others], encoder_hidden_states[others])
        shares_PBN = text_shares(batch.masks_here(hidden_states))
        mixed_BNC = torch.zeros_like(hidden_states[rows])
        for part, context_BTD in enumerate(batch.contexts):
            batch.part = part
            mixed_BNC += shares_PBN[part][:, :, None] * _read(attn, query_RNC[rows], context_BTD)
        batch.part = None
        output_RNC[rows] = mixed_BNC
        return output_RNC


def _read(attn: Any, query_BNC: Tensor, context_BTD: Tensor) -> Tensor:
    """Attention of places to one text, with the layer's output projection (B, N, C)."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    key, value = attn.to_k(context_BTD), attn.to_v(context_BTD)
    seen = F.scaled_dot_product_attention(heads(query_BNC), heads(key), heads(value))
    output: Tensor = attn.to_out[0](seen.transpose(1, 2).flatten(2))
    return attn.to_out[1](output)
