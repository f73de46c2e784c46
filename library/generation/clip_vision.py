"""A picture's CLIP vector in place of the prompt's pooled one (SDXL): the drawing is then about what the picture shows.

Shapes: B pictures, P pooled width, H W pixel height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from library.families.base import TextCondition
from library.generation.critics import CLIP_COLORS, load_clip, normalized
from library.generation.pictures import fit, read_picture, to_tensor
from library.log import UserError


@dataclass
class ClipVision:
    """CLIP's image model, loaded on first use. ``model``: a folder or a hub id; vectors are times ``strength``."""

    model: str
    strength: float
    device: torch.device
    _vectors: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def _network(self) -> Any:
        from transformers import CLIPVisionModelWithProjection

        return load_clip(CLIPVisionModelWithProjection, self.model, "clip_vision_model", self.device)

    def vector(self, path: str) -> Tensor:
        """The vector (P) of a picture's middle."""
        if path not in self._vectors:
            side = self._network.config.image_size
            pixels_BCHW = to_tensor([fit(read_picture(path), (side, side))]) / 2 + 0.5
            with torch.no_grad():
                found = self._network(normalized(pixels_BCHW, CLIP_COLORS).to(self.device)).image_embeds[0]
            self._vectors[path] = found
        return self._vectors[path]

    def in_place_of_text(self, condition: TextCondition, paths: Sequence[str], copies: int) -> TextCondition:
        """The condition whose prompts (not negative or empty ones) have the pictures' vectors as pooled ones.

        ``copies``: of each picture in the condition; the prompts are the second, or the only one. Raises UserError.
        """
        assert condition.pooled_BP is not None
        pooled_BP = condition.pooled_BP.clone()
        width, count = pooled_BP.shape[1], len(paths)
        vectors_BP = self.strength * torch.stack([self.vector(path) for path in paths]).to(pooled_BP)
        if vectors_BP.shape[1] != width:
            raise UserError(
                f"--clip_vision_model {self.model}: its vectors have {vectors_BP.shape[1]} numbers, the model's "
                f"{width}; it must be the counterpart of the second text encoder"
            )
        first = count if copies > 1 else 0
        pooled_BP[first : first + count] = vectors_BP
        return TextCondition(condition.hidden_BTD, pooled_BP)
