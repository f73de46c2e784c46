"""SDXL: two text encoders, a pooled vector, and the sizes of the picture as a condition.

Shape legend: B samples, N token rows, T tokens of a row, L positions of the joined caption, D context width, P pooled
width, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from library import hub
from library.checkpoint.modelspec import CHECKPOINT_IMPLEMENTATION
from library.checkpoint.sdxl_keys import MARKERS, parameter_blocks
from library.families.base import (
    AdapterViews,
    ControlResiduals,
    Geometry,
    ModelParts,
    TextCondition,
    TextSettings,
    TokenBatch,
)
from library.families.plugin_views import text_encoder_view
from library.families.sdxl_view import sdxl_view
from library.families.stable import StableDiffusionFamily
from library.models.spec import EOS_ID, SDXL_LATENT_SCALE, ArchitectureSpec, PredictionType
from library.options.implied import SDXL_BUCKET_STEP
from library.text.encode import apply_weights, encode_tokens, join_rows, pooled_at_first_eos
from library.text.tokenizer import SD1_TOKENIZER, clip_tokenizer
from library.text.tokens import TokenRows, tokenize

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SECOND_TOKENIZER = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
_NEXT_TO_LAST = 2


class SdxlFamily(StableDiffusionFamily):
    """SDXL base and its descendants. The tokenizers are made on first use, from data in the program."""

    name = "sdxl"
    latent_scale = SDXL_LATENT_SCALE
    latent_space = "sdxl"
    bucket_step = SDXL_BUCKET_STEP
    picture_step = 32
    trains_with_clip_skip = False
    modelspec_implementation_network = CHECKPOINT_IMPLEMENTATION
    parts_on_hub = (*hub.MODEL_PARTS, "text_encoder_2")

    def __init__(self, tokenizer_cache_dir: str | None = None) -> None:
        self._tokenizer_cache_dir = tokenizer_cache_dir

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """The first pads with the end mark, the second with id 0."""
        return self._both_tokenizers

    @cached_property
    def _both_tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        folder = self._tokenizer_cache_dir
        return clip_tokenizer(EOS_ID, folder, SD1_TOKENIZER), clip_tokenizer(0, folder, SECOND_TOKENIZER)

    def with_tokenizers(self, tokenizers: Sequence[Any]) -> SdxlFamily:
        first, second = tokenizers
        other = copy.copy(self)
        other._both_tokenizers = (first, second)
        return other

    def _advice(self, found: ArchitectureSpec) -> str:
        return (
            "this script is for SDXL; for Stable Diffusion 1.x and 2.x use the script without sdxl_ in its name, or"
            " leave out --sdxl (there, text encoder outputs are remembered in memory and need no cache)"
        )

    # ---- text

    def tokenize(self, captions: Sequence[str], settings: TextSettings) -> TokenBatch:
        return TokenBatch(tuple(tokenize(tokenizer, captions, settings) for tokenizer in self.tokenizers))

    def encode(self, text_encoders: Sequence[nn.Module], tokens: TokenBatch, settings: TextSettings) -> TextCondition:
        """Next to last states of both encoders, without final norm, side by side; the pooled vector of the second.

        ``settings.clip_skip`` takes another layer, which the U-Net was not trained with.
        """
        first, second = text_encoders
        rows = [tokens_of.to(_device(encoder)) for tokens_of, encoder in zip(tokens.rows, text_encoders, strict=True)]
        layer = settings.clip_skip or _NEXT_TO_LAST
        first_BLD = encode_tokens(first, rows[0], layer, final_norm=False)
        second_BLD, pooled_BP = _encode_second(second, rows[1], layer)
        return TextCondition(torch.cat([first_BLD.to(second_BLD.device), second_BLD], dim=-1), pooled_BP)

    # ---- U-Net

    def predict(
        self,
        unet: nn.Module,
        noisy_latents_BCHW: Tensor,
        timesteps_B: Tensor,
        condition: TextCondition,
        geometry: Geometry | None = None,
        residuals: ControlResiduals | None = None,
    ) -> Tensor:
        added = self.added_conditions(condition, geometry, noisy_latents_BCHW.device)
        hidden_BTD = condition.hidden_BTD
        control = {} if residuals is None else residuals.as_arguments()
        return unet(noisy_latents_BCHW, timesteps_B, hidden_BTD, added_cond_kwargs=added, return_dict=False, **control)[
            0
        ]

    def added_conditions(
        self, condition: TextCondition, geometry: Geometry | None, device: torch.device
    ) -> dict[str, Tensor]:
        if geometry is None or condition.pooled_BP is None:
            raise ValueError("SDXL needs the sizes of the pictures and the pooled text")
        return {"text_embeds": condition.pooled_BP, "time_ids": time_ids(geometry).to(device)}

    def adapter_views(self, parts: ModelParts) -> AdapterViews:
        return AdapterViews([text_encoder_view(encoder) for encoder in parts.text_encoders], sdxl_view(parts.unet))

    def unet_parameter_blocks(self, parts: ModelParts) -> dict[str, int]:
        return parameter_blocks(parts.spec)

    def markers(self, prediction_type: PredictionType, zero_terminal_snr: bool) -> tuple[str, ...]:
        if prediction_type != "v_prediction":
            return ()
        return MARKERS if zero_terminal_snr else MARKERS[:1]

    # ---- names

    def base_model_version(self, prediction_type: PredictionType) -> str:
        return "sdxl_base_v1-0"

    def modelspec_architecture(self, prediction_type: PredictionType) -> str:
        return "stable-diffusion-xl-v1-base"

    def modelspec_resolution(self, prediction_type: PredictionType) -> int:
        return 1024


def time_ids(geometry: Geometry) -> Tensor:
    """The six numbers of the size condition (B, 6), float32: original height, width, crop top, left, target height,
    width. Not to be cast to half precision: sizes would be rounded.
    """
    sizes = (geometry.original_sizes_hw_B2, geometry.crop_top_lefts_B2, geometry.target_sizes_hw_B2)
    return torch.cat(sizes, dim=1).float()


def _encode_second(encoder: nn.Module, tokens: TokenRows, layer: int) -> tuple[Tensor, Tensor]:
    """Joined states (B, L, D) of a layer, counted from the end, and the pooled vector (B, P) of each first row."""
    ids_BNT = tokens.ids_BNT
    rows = ids_BNT.shape[1]
    model = cast(Any, encoder)
    output = model.text_model(input_ids=ids_BNT.flatten(0, 1), output_hidden_states=True)
    hidden_BLD = join_rows(output.hidden_states[-layer], rows)
    if tokens.weights_BL is not None:
        hidden_BLD = apply_weights(hidden_BLD, tokens.weights_BL, tokens.normalize)
    last_BTD = output.last_hidden_state[::rows]
    return hidden_BLD, pooled_at_first_eos(last_BTD, ids_BNT[:, 0], EOS_ID, model.text_projection)


def _device(encoder: nn.Module) -> torch.device:
    return next(encoder.parameters()).device
