"""Stable Diffusion 1.x and 2.x: one text encoder, no pooled vector, no size condition.

Shape legend: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from library import hub
from library.families.base import (
    AdapterViews,
    Geometry,
    ModelFamily,
    ModelParts,
    ModelSource,
    TextCondition,
    TextSettings,
    TokenBatch,
)
from library.log import UserError
from library.models import build, load
from library.models.load import Recognised, Target
from library.models.save import save_folder, save_single_file, whole_folder
from library.models.spec import FAMILY_TITLES, PredictionType
from library.text.encode import encode_tokens
from library.text.tokenizer import EOS_ID, SD1_TOKENIZER, SD2_TOKENIZER, clip_tokenizer
from library.text.tokens import tokenize

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    from library.options import ModelOptions

logger = logging.getLogger(__name__)

_V_SAMPLE_SIZE = 96  # SD2 models that predict velocity were trained at 768 pixels
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class SdFamily(ModelFamily):
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

    # ---- loading and saving

    def load(
        self,
        options: ModelOptions,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        vae_dtype: torch.dtype | None = None,
    ) -> ModelParts:
        source, found = self._find(options)
        prediction = self._prediction(options, found, source)
        vae_source = None if options.vae is None else _resolve(options.vae, "--vae", ("vae",))
        targets = {"text_encoder": Target(dtype, device), "unet": Target(dtype, device)}
        if options.vae is None:
            targets["vae"] = Target(vae_dtype or dtype, device)
        spec = found.spec
        if prediction == "v_prediction" and self.v2 and source.path.is_file() and spec.unet.sample_size == 64:
            spec = replace(spec, unet=replace(spec.unet, sample_size=_V_SAMPLE_SIZE))
        modules: dict[str, Any] = dict(load.load_parts(source.path, spec, targets))
        if vae_source is not None:
            modules["vae"] = load.load_vae(vae_source.path, Target(vae_dtype or dtype, device))
        parts = ModelParts(
            (modules["text_encoder"],), modules["unet"], modules["vae"], spec, prediction, source, vae_source
        )
        _check_latents(parts)
        logger.info("%s: %s, predicts %s", source.name, FAMILY_TITLES[self.name], prediction)
        return parts

    def outline(self, options: ModelOptions) -> ModelParts:
        source, found = self._find(options)
        spec = found.spec
        parts = (
            (build.empty_text_encoder(spec.text_encoders[0]),),
            build.empty_unet(spec.unet),
            build.empty_vae(spec.vae),
        )
        return ModelParts(*parts, spec, self._prediction(options, found, source), source)

    def load_vae(
        self, options: ModelOptions, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> AutoencoderKL:
        if options.vae is not None:
            return load.load_vae(_resolve(options.vae, "--vae", ("vae",)).path, Target(dtype, device))
        source, found = self._find(options)
        modules = load.load_parts(source.path, found.spec, {"vae": Target(dtype, device)})
        return cast("AutoencoderKL", modules["vae"])

    def _find(self, options: ModelOptions) -> tuple[ModelSource, Recognised]:
        """The model on this machine and what it is; refuses another family than the options say."""
        name = "--pretrained_model_name_or_path"
        if not options.pretrained_model_name_or_path:
            raise UserError(f"{name} is needed: a checkpoint file, a Diffusers folder or a hub id")
        source = _resolve(options.pretrained_model_name_or_path, name, hub.MODEL_PARTS)
        found = load.recognise(source.path)
        if found.spec.family != self.name:
            advice = "add --v2" if found.spec.family == "sd2" else "leave out --v2"
            raise UserError(f"{source.given} is a {FAMILY_TITLES[found.spec.family]} model: {advice}")
        if found.spec.unet.in_channels != self.latent_channels:
            count = found.spec.unet.in_channels
            raise UserError(
                f"{source.given} takes {count} input channels (inpainting or depth); only 4 can be trained here"
            )
        layers = found.spec.text_encoders[0].layers
        if options.clip_skip is not None and options.clip_skip > layers:
            raise UserError(f"--clip_skip {options.clip_skip}: this text encoder has {layers} layers; choose fewer")
        return source, found

    def _prediction(self, options: ModelOptions, found: Recognised, source: ModelSource) -> PredictionType:
        asked: PredictionType = "v_prediction" if options.v_parameterization else "epsilon"
        if found.prediction_type is None or found.prediction_type == asked:
            return asked
        if found.prediction_type == "v_prediction":
            raise UserError(f"{source.given} says that it predicts velocity: add --v_parameterization")
        raise UserError(f"{source.given} says that it predicts noise: leave out --v_parameterization")

    def save_checkpoint(
        self, parts: ModelParts, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        save_single_file(path, parts.spec, _by_name(parts), dtype, metadata, parts.source.path)

    def save_diffusers(self, parts: ModelParts, folder: Path, dtype: torch.dtype | None) -> None:
        with whole_folder(folder) as temporary:
            save_folder(temporary, parts.spec, _by_name(parts), parts.prediction_type, dtype)
            self.tokenizer.save_pretrained(temporary / "tokenizer")

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
    ) -> Tensor:
        return unet(noisy_latents_BCHW, timesteps_B, condition.hidden_BTD, return_dict=False)[0]

    def adapter_views(self, parts: ModelParts) -> AdapterViews:
        name_for_plugins(parts.unet)
        return AdapterViews([text_encoder_view(encoder) for encoder in parts.text_encoders], parts.unet)

    # ---- names

    def default_sample_size(self, parts: ModelParts) -> int:
        return parts.spec.unet.sample_size * self.latent_factor

    def base_model_version(self, prediction_type: PredictionType) -> str:
        return ("sd_v2" if self.v2 else "sd_v1") + ("_v" if prediction_type == "v_prediction" else "")

    def modelspec_architecture(self, prediction_type: PredictionType) -> str:
        if not self.v2:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if prediction_type == "v_prediction" else "stable-diffusion-v2-512"

    def modelspec_resolution(self, prediction_type: PredictionType) -> int:
        return 768 if self.v2 and prediction_type == "v_prediction" else 512


class TextEncoderView(nn.Module):
    """A text encoder under the attribute ``text_model``: network plug-ins derive their names from that path.

    Shares its modules with the encoder; has what plug-ins ask of a model: ``device``, ``dtype``, ``config``, a forward.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder
        self.config = cast(Any, encoder).config

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return next(self.parameters()).dtype

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return cast(Any, self.text_model).get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own."""
        return self.text_model(*args, **kwargs)


def text_encoder_view(encoder: nn.Module) -> nn.Module:
    """The encoder with a ``text_model`` level in its paths, whether the library's class has one or not."""
    has_level = any(name == "text_model" for name, _ in encoder.named_children())
    return encoder if has_level else TextEncoderView(encoder)


_PLUGIN_CLASS_NAMES = {"Attention": "CrossAttention", "TimestepEmbedding": "TimeEmbedding"}


def name_for_plugins(unet: nn.Module) -> None:
    """Give blocks of the U-Net the class names that plug-ins of the common protocol look for; nothing else changes.

    LyCORIS finds attention as ``CrossAttention``. It lists the time embedding's two layers by name and, since version
    4, by the class ``TimestepEmbedding`` of another architecture: a U-Net with both would get those layers twice.
    """
    renamed: dict[type[nn.Module], type[nn.Module]] = {}
    for module in unet.modules():
        original = type(module)
        name = _PLUGIN_CLASS_NAMES.get(original.__name__)
        if name is not None:
            module.__class__ = renamed.setdefault(original, type(name, (original,), {}))


def _by_name(parts: ModelParts) -> dict[str, nn.Module]:
    return {"text_encoder": parts.text_encoders[0], "unet": parts.unet, "vae": parts.vae}


def _check_latents(parts: ModelParts) -> None:
    channels, wanted = parts.spec.unet.in_channels, cast(Any, parts.vae).config.latent_channels
    if channels != wanted:
        name = parts.vae_source.given if parts.vae_source else parts.source.given
        raise UserError(f"--vae {name}: it makes latents of {wanted} channels, the model needs {channels}")


def _resolve(given: str, option: str, parts: Sequence[str]) -> ModelSource:
    """A local file or folder (links followed), or a hub id that is fetched once. Raises UserError for a wrong path."""
    path = Path(given).expanduser()
    if path.exists():
        return ModelSource(given, path.resolve())
    is_hub_id = given.count("/") <= 1 and "\\" not in given and given[0] not in "./~"
    if not is_hub_id or given.lower().endswith(_FILE_SUFFIXES):
        raise UserError(f"{option}: there is no file or folder {given}")
    return ModelSource(given, hub.download_model(given, option, parts))
