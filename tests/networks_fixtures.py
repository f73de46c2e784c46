"""Small models for the network tests, made from the model libraries' classes; full sizes exist only on meta."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.families.sdxl_view import UNetView, sdxl_view

LEVELS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_LEVELS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


class TextEncoderView(nn.Module):
    """What third-party networks expect: the encoder as attribute ``text_model``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


def make_unet(widths: tuple[int, ...], context: int, sd2: bool = False, heads: int = 4) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": widths,
        "down_block_types": LEVELS,
        "up_block_types": UP_LEVELS,
        "layers_per_block": 2,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "use_linear_projection": sd2,
        "norm_num_groups": 16 if widths[0] % 32 else 32,
    }
    return UNet2DConditionModel(**config).requires_grad_(False)


def make_sdxl_unet(
    widths: tuple[int, ...], context: int, pooled: int, depths: tuple[int, ...], heads: int | tuple[int, ...] = 4
) -> UNet2DConditionModel:
    size_width = 256 if widths[0] == 320 else 16
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": depths,
        "layers_per_block": 2,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_width,
        "projection_class_embeddings_input_dim": pooled + 6 * size_width,
    }
    return UNet2DConditionModel(**config).requires_grad_(False)


def make_clip(width: int, layers: int, mlp: int, vocabulary: int = 100) -> CLIPTextModel:
    return CLIPTextModel(clip_config(width, layers, mlp, vocabulary)).requires_grad_(False)


def make_second_clip(width: int, layers: int, mlp: int, vocabulary: int, pooled: int) -> CLIPTextModelWithProjection:
    config = clip_config(width, layers, mlp, vocabulary, pooled)
    return CLIPTextModelWithProjection(config).requires_grad_(False)


def clip_config(width: int, layers: int, mlp: int, vocabulary: int, pooled: int | None = None) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=2,
        eos_token_id=vocabulary - 1,
        projection_dim=pooled or width,
    )


def toy_models(sd2: bool = False, layers: int = 2) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A text encoder and a U-Net of toy width with all blocks of the real ones; weights are always the same."""
    return copy.deepcopy(_toy_models_once(sd2, layers))


@functools.cache
def _toy_models_once(sd2: bool, layers: int) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """The same, shared by everyone in this process: not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_clip(32, layers, 64), make_unet((32, 64, 64, 64), 32, sd2)


def full_models(sd2: bool = False) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """SD1.5 or SD2.1 at full size, without memory for the weights."""
    with torch.device("meta"):
        if sd2:
            return make_clip(1024, 23, 4096, 49408), make_unet((320, 640, 1280, 1280), 1024, True)
        return make_clip(768, 12, 3072, 49408), make_unet((320, 640, 1280, 1280), 768)


def toy_sdxl_models() -> tuple[list[nn.Module], UNetView]:
    """Both text encoders and a U-Net of toy width with all blocks of SDXL, as the family gives them to networks."""
    encoders, unet = bare_sdxl_models()
    return encoders, sdxl_view(unet)


def bare_sdxl_models() -> tuple[list[nn.Module], UNet2DConditionModel]:
    """The same with diffusers' own U-Net; weights are always the same."""
    return copy.deepcopy(_toy_sdxl_models_once())


@functools.cache
def _toy_sdxl_models_once() -> tuple[list[nn.Module], UNet2DConditionModel]:
    """The same, shared by everyone in this process: not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoders: list[nn.Module] = [make_clip(32, 2, 64), make_second_clip(64, 3, 128, 100, 48)]
        return encoders, make_sdxl_unet((32, 64, 64), 96, 48, (1, 2, 3))


def full_sdxl_models() -> tuple[list[nn.Module], UNetView]:
    """SDXL at full size as the family gives it to networks, without memory for the weights."""
    encoders, unet = bare_full_sdxl_models()
    return encoders, sdxl_view(unet)


def bare_full_sdxl_models() -> tuple[list[nn.Module], UNet2DConditionModel]:
    """The same with diffusers' own U-Net."""
    with torch.device("meta"):
        encoders: list[nn.Module] = [
            make_clip(768, 12, 3072, 49408),
            make_second_clip(1280, 32, 5120, 49408, 1280),
        ]
        return encoders, make_sdxl_unet((320, 640, 1280), 2048, 1280, (1, 2, 10), (5, 10, 20))


def run_sdxl_unet(unet: nn.Module, seed: int = 1) -> Tensor:
    """One prediction of a toy SDXL U-Net for fixed inputs, (2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    context_BTD = torch.randn(2, 7, 96, generator=generator)
    pooled_BP = torch.randn(2, 48, generator=generator)
    sizes_B6 = torch.tensor([[64.0, 64, 0, 0, 64, 64], [80, 64, 8, 0, 64, 64]])
    added = {"text_embeds": pooled_BP, "time_ids": sizes_B6}
    return unet(latents_BCHW, torch.tensor([10, 500]), context_BTD, added_cond_kwargs=added).sample


def run_unet(unet: nn.Module, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """One prediction of a toy U-Net for fixed inputs, (2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    context_BTD = torch.randn(2, 7, 32, generator=generator).to(dtype)
    return unet(latents_BCHW, torch.tensor([10, 500]), context_BTD).sample


def run_clip(encoder: nn.Module) -> Tensor:
    """The last hidden state of a toy text encoder for fixed ids."""
    return encoder(torch.tensor([[1, 5, 7, 99], [1, 9, 99, 99]])).last_hidden_state


def randomise(network: nn.Module, seed: int = 3, size: float = 0.3) -> None:
    """Give every trained tensor values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(network.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size / parameter.shape[0] ** 0.5)
