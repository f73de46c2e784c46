"""What SD1, SD2 and SDXL have in common: finding, checking, loading and writing a model."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from library import hub
from library.checkpoint.folders import atomic_folder, recover
from library.families.base import ModelFamily, ModelParts, ModelSource
from library.log import UserError
from library.models import build, load
from library.models.load import Recognised, Target
from library.models.save import save_folder, save_single_file
from library.models.spec import FAMILY_TITLES, ArchitectureSpec, PredictionType, TextEncoderSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    from library.options import ModelOptions

logger = logging.getLogger(__name__)


class StableDiffusionFamily(ModelFamily):
    """Loading and saving, in single files and Diffusers folders. ``parts_on_hub`` are the folders of a hub model."""

    parts_on_hub: tuple[str, ...] = hub.MODEL_PARTS

    @property
    @abstractmethod
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """One per text encoder."""

    @abstractmethod
    def _advice(self, found: ArchitectureSpec) -> str:
        """What to do with a model of another family."""

    def _spec_to_load(self, found: Recognised, prediction: PredictionType, source: ModelSource) -> ArchitectureSpec:
        """The architecture with what only the options tell."""
        return found.spec

    def load(
        self,
        options: ModelOptions,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        part_dtypes: Mapping[str, torch.dtype] | None = None,
        token: str | None = None,
    ) -> ModelParts:
        source, found = self._find(options, token)
        prediction = self._prediction(options, found, source)
        vae_source = _vae_source(options, token)
        names = (*found.spec.text_parts, "unet", "vae")
        targets = {name: Target((part_dtypes or {}).get(name, dtype), device) for name in names}
        vae_target = targets["vae"]
        if options.vae is not None:
            del targets["vae"]
        spec = self._spec_to_load(found, prediction, source)
        modules: dict[str, Any] = dict(load.load_parts(source.path, spec, targets))
        if vae_source is not None:
            modules["vae"] = load.load_vae(vae_source.path, vae_target)
        parts = ModelParts(
            tuple(modules[name] for name in spec.text_parts),
            modules["unet"],
            modules["vae"],
            spec,
            prediction,
            source,
            vae_source,
            found.zero_terminal_snr,
        )
        _check_latents(parts)
        logger.info("%s: %s, predicts %s", source.name, FAMILY_TITLES[self.name], prediction)
        return parts

    def default_sample_size(self, parts: ModelParts) -> int:
        return parts.spec.unet.sample_size * self.latent_factor

    def outline(self, options: ModelOptions, *, token: str | None = None) -> ModelParts:
        source, found = self._find(options, token)
        vae_source = _vae_source(options, token)
        spec = found.spec
        text_encoders = tuple(build.empty_text_encoder(text) for text in spec.text_encoders)
        parts = (text_encoders, build.empty_unet(spec.unet), build.empty_vae(spec.vae))
        return ModelParts(*parts, spec, self._prediction(options, found, source), source, vae_source)

    def load_vae(
        self,
        options: ModelOptions,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        token: str | None = None,
    ) -> AutoencoderKL:
        vae_source = _vae_source(options, token)
        if vae_source is not None:
            return load.load_vae(vae_source.path, Target(dtype, device))
        source, found = self._find(options, token)
        modules = load.load_parts(source.path, found.spec, {"vae": Target(dtype, device)})
        return cast("AutoencoderKL", modules["vae"])

    def load_text_encoders(
        self,
        options: ModelOptions,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        token: str | None = None,
    ) -> tuple[tuple[nn.Module, ...], tuple[TextEncoderSpec, ...]]:
        source, found = self._find(options, token)
        names = found.spec.text_parts
        modules = load.load_parts(source.path, found.spec, {name: Target(dtype, device) for name in names})
        return tuple(modules[name] for name in names), found.spec.text_encoders

    def reload(self, parts: ModelParts, names: Collection[str], dtype: torch.dtype) -> ModelParts:
        target = Target(dtype)
        own = [name for name in names if name != "vae" or parts.vae_source is None]
        modules: dict[str, Any] = dict(load.load_parts(parts.source.path, parts.spec, dict.fromkeys(own, target)))
        if "vae" in names and parts.vae_source is not None:
            modules["vae"] = load.load_vae(parts.vae_source.path, target)
        modules = {**parts.by_name(), **modules}
        text_encoders = tuple(modules[name] for name in parts.spec.text_parts)
        return replace(parts, text_encoders=text_encoders, unet=modules["unet"], vae=modules["vae"])

    def _find(self, options: ModelOptions, token: str | None) -> tuple[ModelSource, Recognised]:
        """The model on this machine and what it is; refuses another family than the options say."""
        name = "--pretrained_model_name_or_path"
        if not options.pretrained_model_name_or_path:
            raise UserError(f"{name} is needed: a checkpoint file, a Diffusers folder or a hub id")
        source = find_source(options.pretrained_model_name_or_path, name, self.parts_on_hub, token)
        found = load.recognise(source.path)
        if found.spec.family != self.name:
            article = "an" if found.spec.family == "sdxl" else "a"
            title = FAMILY_TITLES[found.spec.family]
            raise UserError(f"{source.given} is {article} {title} model: {self._advice(found.spec)}")
        if found.spec.unet.in_channels != self.latent_channels:
            count = found.spec.unet.in_channels
            raise UserError(
                f"{source.given} takes {count} input channels (inpainting or depth); only those with 4 can be used here"
            )
        self._check_text(options, found.spec)
        return source, found

    def _check_text(self, options: ModelOptions, spec: ArchitectureSpec) -> None:
        """Refuse options of the text side that this model cannot follow."""

    def _prediction(self, options: ModelOptions, found: Recognised, source: ModelSource) -> PredictionType:
        asked: PredictionType = "v_prediction" if options.v_parameterization else "epsilon"
        if found.prediction_type is None or found.prediction_type == asked:
            return asked
        if found.prediction_type == "v_prediction":
            raise UserError(f"{source.given} says that it predicts velocity: add --v_parameterization")
        raise UserError(f"{source.given} says that it predicts noise: leave out --v_parameterization")

    def save_checkpoint(
        self,
        parts: ModelParts,
        path: Path,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None = None,
        counters: Mapping[str, int] | None = None,
    ) -> None:
        source, markers = parts.source.path, self.markers(parts.prediction_type, parts.zero_terminal_snr)
        save_single_file(path, parts.spec, parts.by_name(), dtype, metadata, source, markers, counters)

    def save_diffusers(self, parts: ModelParts, folder: Path, dtype: torch.dtype | None) -> None:
        with atomic_folder(folder) as temporary:
            save_folder(temporary, parts.spec, parts.by_name(), parts.prediction_type, dtype, parts.zero_terminal_snr)
            for tokenizer, name in zip(self.tokenizers, ("tokenizer", "tokenizer_2"), strict=False):
                tokenizer.save_pretrained(temporary / name)


def _vae_source(options: ModelOptions, token: str | None) -> ModelSource | None:
    return None if options.vae is None else find_source(options.vae, "--vae", ("vae",), token)


def _check_latents(parts: ModelParts) -> None:
    channels, wanted = parts.spec.unet.in_channels, cast(Any, parts.vae).config.latent_channels
    if channels != wanted:
        vae = parts.vae_source
        given = f"--vae {vae.given}" if vae else f"--pretrained_model_name_or_path {parts.source.given}"
        raise UserError(f"{given}: it makes latents of {wanted} channels, the model needs {channels}")


def may_be_hub_id(given: str) -> bool:
    """True if what is no file or folder here may still be ``name`` or ``owner/name`` on the hub."""
    is_path = given.count("/") > 1 or "\\" in given or given[0] in "./~"
    return not is_path and not given.lower().endswith(hub.WEIGHT_SUFFIXES)


def find_source(
    given: str, option: str, parts: Sequence[str], token: str | None = None, variant: str | None = None
) -> ModelSource:
    """A local file or folder (links followed), or a hub id that is fetched once. Raises UserError for a wrong path.

    ``variant``: which of the files on the hub, see `hub.files_of_model`.
    """
    path = Path(given).expanduser()
    recover(path)
    if path.exists():
        return ModelSource(given, path.resolve())
    if not may_be_hub_id(given):
        raise UserError(f"{option}: there is no file or folder {given}")
    return ModelSource(given, hub.download_model(given, option, parts, token, variant))
