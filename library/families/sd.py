"""Stable Diffusion 1.x and 2.x: one text encoder, no pooled vector, no size condition.

Shape legend: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.families.base import (
    AdapterViews,
    ControlResiduals,
    Geometry,
    ModelParts,
    ModelSource,
    TextCondition,
    TextSettings,
    TokenBatch,
)
from library.families.plugin_views import name_for_plugins, text_encoder_view
from library.families.stable import StableDiffusionFamily
from library.log import UserError
from library.models.load import Recognised
from library.models.spec import EOS_ID, ArchitectureSpec, PredictionType
from library.text.encode import encode_tokens
from library.text.tokenizer import SD1_TOKENIZER, SD2_TOKENIZER, clip_tokenizer
from library.text.tokens import tokenize

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from library.options import ModelOptions

_V_SAMPLE_SIZE = 96  # SD2 models that predict velocity were trained at 768 pixels


class SdFamily(StableDiffusionFamily):
    """SD1, or SD2 with ``v2``. The tokenizer is made on first use, from data in the program."""

    latent_scale = 0.18215
    modelspec_implementation_network = "diffusers"

    def __init__(self, v2: bool = False, tokenizer_cache_dir: str | None = None) -> None:
        self.v2 = v2
        self.name = "sd2" if v2 else "sd1"
        self._tokenizer_cache_dir = tokenizer_cache_dir

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The family's tokenizer: SD2 pads with id 0, SD1 with the end mark."""
        source = SD2_TOKENIZER if self.v2 else SD1_TOKENIZER
        return clip_tokenizer(0 if self.v2 else EOS_ID, self._tokenizer_cache_dir, source)

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        return (self.tokenizer,)

    def with_tokenizers(self, tokenizers: Sequence[Any]) -> SdFamily:
        other = copy.copy(self)
        (other.tokenizer,) = tokenizers
        return other

    def _advice(self, found: ArchitectureSpec) -> str:
        if found.family == "sdxl":
            return (
                "this script is for Stable Diffusion 1.x and 2.x; use the script of the same kind for SDXL, or --sdxl"
                " where the script has it"
            )
        return "add --v2" if found.family == "sd2" else "leave out --v2"

    def _spec_to_load(self, found: Recognised, prediction: PredictionType, source: ModelSource) -> ArchitectureSpec:
        spec = found.spec
        if prediction == "v_prediction" and self.v2 and source.path.is_file() and spec.unet.sample_size == 64:
            return replace(spec, unet=replace(spec.unet, sample_size=_V_SAMPLE_SIZE))
        return spec

    def _check_text(self, options: ModelOptions, spec: ArchitectureSpec) -> None:
        layers = spec.text_encoders[0].layers
        if options.clip_skip is not None and options.clip_skip > layers:
            raise UserError(f"--clip_skip {options.clip_skip}: this text encoder has {layers} layers; choose fewer")

    # ---- text

    def tokenize(self, captions: Sequence[str], settings: TextSettings) -> TokenBatch:
        return TokenBatch((tokenize(self.tokenizer, captions, settings),))

    def encode(self, text_encoders: Sequence[nn.Module], tokens: TokenBatch, settings: TextSettings) -> TextCondition:
        (encoder,) = text_encoders
        rows = tokens.rows[0].to(next(encoder.parameters()).device)
        return TextCondition(encode_tokens(encoder, rows, settings.clip_skip))

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
        added = {} if residuals is None else residuals.as_arguments()
        return unet(noisy_latents_BCHW, timesteps_B, condition.for_unet, return_dict=False, **added)[0]

    def adapter_views(self, parts: ModelParts) -> AdapterViews:
        name_for_plugins(parts.unet)
        return AdapterViews([text_encoder_view(encoder) for encoder in parts.text_encoders], parts.unet)

    # ---- names

    def base_model_version(self, prediction_type: PredictionType) -> str:
        return ("sd_v2" if self.v2 else "sd_v1") + ("_v" if prediction_type == "v_prediction" else "")

    def modelspec_architecture(self, prediction_type: PredictionType) -> str:
        if not self.v2:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if prediction_type == "v_prediction" else "stable-diffusion-v2-512"

    def modelspec_resolution(self, prediction_type: PredictionType) -> int:
        return 768 if self.v2 and prediction_type == "v_prediction" else 512
