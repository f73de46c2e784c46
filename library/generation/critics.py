"""Networks that look at pictures: CLIP and VGG16, for guidance by a text or by another picture.

Shapes: B pictures (B, 3, H, W) in 0..1, D width of CLIP's common space, C channels of features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.checkpoint.io import open_model_file
from library.log import UserError, first_line
from library.text.emphasis import BREAK, parse_emphasis
from library.text.tokenizer import clip_tokenizer

# A. Radford and others, arXiv:2103.00020, and the ImageNet pictures: mean and deviation of the colours in 0..1.
CLIP_COLORS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLORS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VGG_SHRINK = 4  # VGG16 sees pictures at a quarter of their size
_VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # K. Simonyan and A. Zisserman, arXiv:1409.1556
_VGG16_POOLS = (4, 9, 16, 23, 30)
_FEATURE_KEY = re.compile(r"^features\.(?P<layer>\d+)\.(?:weight|bias)$")


def load_clip(kind: Any, model: str, option: str, device: torch.device) -> Any:
    """A CLIP model of a class of transformers, from a folder or by its hub id, frozen, in float32. Raises UserError."""
    local = Path(model).expanduser()
    try:
        loaded = kind.from_pretrained(str(local) if local.is_dir() else model, dtype=torch.float32)
    except Exception as error:  # the library and the hub's client raise many kinds
        raise UserError(
            f"--{option} {model}: cannot be loaded ({first_line(error)}); give the folder of a CLIP model with an "
            "image part, or its hub id"
        ) from error
    return loaded.to(device).eval().requires_grad_(False)


class ClipCritic:
    """A CLIP model that gives texts and pictures a place in a common space. ``model``: folder or hub id."""

    def __init__(self, model: str, device: torch.device) -> None:
        from transformers import CLIPModel

        self._model = loaded = load_clip(CLIPModel, model, "clip_guidance_model", device)
        self._device = device
        self._tokenizer = clip_tokenizer()
        self._side: int = loaded.config.vision_config.image_size
        self._length: int = loaded.config.text_config.max_position_embeddings

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts: their first 75 tokens, without marks of emphasis."""
        plain = [" ".join(piece.text for piece in parse_emphasis(text, True) if piece is not BREAK) for text in texts]
        tokens: Any = self._tokenizer(
            plain, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        pooled_BD = self._model.text_model(input_ids=tokens.input_ids.to(self._device)).pooler_output
        return F.normalize(self._model.text_projection(pooled_BD), dim=-1)

    def pictures(self, pictures_B3HW: Tensor, mode: str = "bilinear") -> Tensor:
        """Unit vectors (B, D) of pictures, with gradients. ``mode``: how they are brought to the model's size."""
        smooth = {"antialias": True} if mode == "bilinear" else {}
        sized = F.interpolate(pictures_B3HW.float(), (self._side, self._side), mode=mode, **smooth)
        pooled_BD = self._model.vision_model(pixel_values=normalized(sized, CLIP_COLORS)).pooler_output
        return F.normalize(self._model.visual_projection(pooled_BD), dim=-1)


def sphere_distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Squared distance on the sphere of unit vectors (B), up to a factor: 2 arcsin(|a - b| / 2)^2."""
    return 2 * ((a_BD - b_BD).norm(dim=-1) / 2).clamp(max=1 - 1e-6).arcsin().square()


class VggCritic(nn.Module):
    """The features of one layer of VGG16. Weights in torchvision's naming (``features.0.weight`` ...)."""

    def __init__(self, weights: str | None, layer: int) -> None:
        super().__init__()
        if weights is None:
            raise UserError(
                "--vgg16_guidance_scale needs --vgg16_weights: "
                "torchvision's file for VGG16 on ImageNet (vgg16-397923af.pth)"
            )
        with open_model_file(Path(weights).expanduser()) as file:
            state = {key: file.tensor(key) for key in file.infos if _FEATURE_KEY.match(key)}
        layers = [self._layer(index, state, weights) for index in range(layer + 1)]
        self.features = nn.Sequential(*layers)
        self.eval().requires_grad_(False)

    @staticmethod
    def _layer(index: int, state: dict[str, Tensor], where: str) -> nn.Module:
        if index in _VGG16_POOLS:
            return nn.MaxPool2d(2)
        if index not in _VGG16_CONVOLUTIONS:
            return nn.ReLU()
        try:
            weight, bias = (state[f"features.{index}.{kind}"].float() for kind in ("weight", "bias"))
        except KeyError as error:
            raise UserError(
                f"--vgg16_weights {where}: it has no tensor {error.args[0]}; torchvision's vgg16 is needed"
            ) from error
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        """Features (B, C, h, w) of pictures at a quarter of their size, with gradients."""
        height, width = (max(1, side // VGG_SHRINK) for side in pictures_B3HW.shape[-2:])
        small = F.interpolate(pictures_B3HW.float(), (height, width), mode="bilinear", antialias=True)
        return cast(Tensor, self.features(normalized(small, IMAGENET_COLORS)))


def normalized(pictures_B3HW: Tensor, colors: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Pictures in 0..1 with these colours' mean and deviation taken out, as a network was trained to see them."""
    mean_311, std_311 = (torch.tensor(values, device=pictures_B3HW.device)[:, None, None] for values in colors)
    return (pictures_B3HW - mean_311) / std_311
