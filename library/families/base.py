"""What the rest of the program may ask of a model family: load, tokenise, encode, predict, constants, names.

Shape legend: B samples, C latent channels, H W latent or pixel height and width, N token rows, T tokens, D context
width, P pooled width, S cross-attention layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from library.checkpoint.hashes import FileHashes, file_hashes
from library.log import UserError
from library.models.spec import ArchitectureSpec, PredictionType, TextEncoderSpec
from library.text.tokens import TextSettings, TokenRows

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from library.options import ModelOptions


@dataclass(frozen=True)
class ModelSource:
    """Where weights came from. ``given`` is the text of the option, ``path`` is the local file or folder."""

    given: str
    path: Path

    @property
    def is_local(self) -> bool:
        """False for what came from the hub."""
        return Path(self.given).expanduser().resolve() == self.path

    @property
    def name(self) -> str:
        """File or folder name, or the hub id: no path of this machine."""
        return Path(self.given).name if self.is_local else self.given

    @cached_property
    def hashes(self) -> FileHashes | None:
        """Hashes of the file (for a folder the words that stand for it), computed on first use; None for a hub id."""
        return file_hashes(self.path) if self.is_local else None


@dataclass(frozen=True)
class ModelParts:
    """A loaded model. ``prediction_type`` is what the U-Net predicts, checked against the options.

    ``zero_terminal_snr``: the model says that the noise schedule of its training ended in pure noise.
    """

    text_encoders: tuple[nn.Module, ...]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    spec: ArchitectureSpec
    prediction_type: PredictionType
    source: ModelSource
    vae_source: ModelSource | None = None
    zero_terminal_snr: bool = False

    def by_name(self) -> dict[str, nn.Module]:
        """All parts under the names of their Diffusers folders: text_encoder, text_encoder_2, unet, vae."""
        texts = dict(zip(self.spec.text_parts, self.text_encoders, strict=True))
        return {**texts, "unet": self.unet, "vae": self.vae}

    def modules(self) -> tuple[nn.Module, ...]:
        """All parts: text encoders, U-Net, VAE."""
        return (*self.text_encoders, self.unet, self.vae)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Captions as rows of token ids, with emphasis weights where captions are weighted: an entry for each text encoder,
    or for each cross-attention layer where words mean something else to each.
    """

    rows: tuple[TokenRows, ...]

    @property
    def size(self) -> int:
        """Number of captions."""
        return self.rows[0].ids_BNT.shape[0]


@dataclass(frozen=True, slots=True)
class TextCondition:
    """What the U-Net is told about the text. ``pooled_BP`` only where the family uses it.

    ``by_layer_BSTD``: what each of S cross-attention layers is told, where that differs; ``hidden_BTD`` is then what
    the first one is told (and others than the U-Net are).
    """

    hidden_BTD: Tensor
    pooled_BP: Tensor | None = None
    by_layer_BSTD: Tensor | None = None

    @property
    def for_unet(self) -> Tensor:
        """The U-Net's ``encoder_hidden_states``: (B, S, T, D) or (B, T, D)."""
        return self.hidden_BTD if self.by_layer_BSTD is None else self.by_layer_BSTD

    def rows(self, rows: slice) -> TextCondition:
        """The condition of some of the samples."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device, dtype: torch.dtype) -> TextCondition:
        """The same on another device and in another type."""
        return self._map(lambda tensor: tensor.to(device, dtype))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TextCondition:
        others = (None if tensor is None else change(tensor) for tensor in (self.pooled_BP, self.by_layer_BSTD))
        return TextCondition(change(self.hidden_BTD), *others)


@dataclass(frozen=True, slots=True)
class Geometry:
    """True sizes of the samples in pixels, each (B, 2) as (height, width) or (top, left).

    SD1 and SD2 do not use them.
    """

    original_sizes_hw_B2: Tensor
    crop_top_lefts_B2: Tensor
    target_sizes_hw_B2: Tensor


@dataclass(frozen=True, slots=True)
class ControlResiduals:
    """What ControlNets add to a U-Net: to each of its skip connections (B, C, H, W), first block first, and to the
    output of its middle block.
    """

    skips: tuple[Tensor, ...]
    middle_BCHW: Tensor

    def __add__(self, other: ControlResiduals) -> ControlResiduals:
        """Of two nets that act together."""
        skips = tuple(one + more for one, more in zip(self.skips, other.skips, strict=True))
        return ControlResiduals(skips, self.middle_BCHW + other.middle_BCHW)

    def as_arguments(self) -> dict[str, Any]:
        """Under the names of the U-Net's forward."""
        return {
            "down_block_additional_residuals": self.skips,
            "mid_block_additional_residual": self.middle_BCHW,
        }


class AdapterViews(NamedTuple):
    """The modules that are handed to network plug-ins."""

    text_encoders: list[nn.Module]
    unet: nn.Module

    @property
    def text_encoder(self) -> nn.Module | list[nn.Module]:
        """What plug-ins take under this name: the only one itself, or the list of both."""
        return self.text_encoders[0] if len(self.text_encoders) == 1 else self.text_encoders


class LatentPosterior(Protocol):
    """The VAE's distribution of latents for images, as diffusers gives it."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor: ...

    def mode(self) -> Tensor: ...


__all__ = [
    "AdapterViews",
    "ControlResiduals",
    "Geometry",
    "LatentPosterior",
    "ModelFamily",
    "ModelParts",
    "ModelSource",
    "TextCondition",
    "TextSettings",
    "TokenBatch",
]


class ModelFamily(ABC):
    """Everything that an architecture decides. Instances hold no weights."""

    name: str
    latent_scale: float
    latent_space: str = "sd"  # models with the same name can share cached latents
    latent_channels: int = 4
    latent_factor: int = 8  # pixels per latent cell
    bucket_step: int = 8  # steps between bucket sizes must be multiples of it, in pixels
    picture_step: int = 8  # sides of pictures must be multiples of it, in pixels
    trains_with_clip_skip: bool = True  # False: training takes the family's own layer whatever --clip_skip says
    modelspec_implementation_network: str

    @abstractmethod
    def load(
        self,
        options: ModelOptions,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        part_dtypes: Mapping[str, torch.dtype] | None = None,
        token: str | None = None,
    ) -> ModelParts:
        """Load the model that the options name, in ``dtype`` on ``device``, in eval mode and frozen.

        ``part_dtypes``: types of parts that differ from it, by name (unet, vae, text_encoder, text_encoder_2).
        ``token``, here and below: for a model that the hub gives only to some; without it HF_TOKEN counts.
        """

    @abstractmethod
    def outline(self, options: ModelOptions, *, token: str | None = None) -> ModelParts:
        """What the options name, without its weights (meta tensors): for plans."""

    @abstractmethod
    def load_vae(
        self,
        options: ModelOptions,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        token: str | None = None,
    ) -> AutoencoderKL:
        """Only the VAE of what the options name: for caching latents ahead of time."""

    @abstractmethod
    def load_text_encoders(
        self,
        options: ModelOptions,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        token: str | None = None,
    ) -> tuple[tuple[nn.Module, ...], tuple[TextEncoderSpec, ...]]:
        """Only the text encoders of what the options name, and what they are: for encoding captions ahead of time."""

    @abstractmethod
    def reload(self, parts: ModelParts, names: Collection[str], dtype: torch.dtype) -> ModelParts:
        """The same model with the parts of these names read anew from where they came from, on the CPU.

        Raises UserError if that is there no more.
        """

    @property
    @abstractmethod
    def tokenizers(self) -> tuple[Any, ...]:
        """One per text encoder."""

    @abstractmethod
    def with_tokenizers(self, tokenizers: Sequence[Any]) -> ModelFamily:
        """The same family with other tokenizers; this one keeps its own."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str], settings: TextSettings) -> TokenBatch:
        """Token rows of the captions."""

    @abstractmethod
    def encode(self, text_encoders: Sequence[nn.Module], tokens: TokenBatch, settings: TextSettings) -> TextCondition:
        """The condition of token rows, on the encoders' device, in their type."""

    @abstractmethod
    def predict(
        self,
        unet: nn.Module,
        noisy_latents_BCHW: Tensor,
        timesteps_B: Tensor,
        condition: TextCondition,
        geometry: Geometry | None = None,
        residuals: ControlResiduals | None = None,
    ) -> Tensor:
        """The U-Net's output (noise or velocity), shaped like the latents. ``residuals``: what ControlNets add."""

    def predict_control(
        self,
        net: nn.Module,
        noisy_latents_BCHW: Tensor,
        timesteps_B: Tensor,
        condition: TextCondition,
        geometry: Geometry | None = None,
        *,
        guide_BCHW: Tensor,
        strength: float = 1.0,
    ) -> ControlResiduals:
        """What a ControlNet adds for the same inputs. ``guide_BCHW``: the guide picture in 0..1, at the pixels that the
        latents stand for.
        """
        skips, middle_BCHW = net(
            noisy_latents_BCHW,
            timesteps_B,
            condition.hidden_BTD,
            guide_BCHW,
            strength,
            added_cond_kwargs=self.added_conditions(condition, geometry, noisy_latents_BCHW.device),
            return_dict=False,
        )
        return ControlResiduals(tuple(skips), middle_BCHW)

    def added_conditions(
        self, condition: TextCondition, geometry: Geometry | None, device: torch.device
    ) -> dict[str, Tensor]:
        """What the U-Net is told beside time and text, by the names that diffusers gives it."""
        return {}

    @abstractmethod
    def save_checkpoint(
        self,
        parts: ModelParts,
        path: Path,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None = None,
        counters: Mapping[str, int] | None = None,
    ) -> None:
        """Write a Stability single file, floating point tensors cast to ``dtype`` (None: as they are).

        A path that ends in .ckpt gives the old pickled form, with ``counters`` (epoch, global_step); metadata have no
        place there.
        """

    @abstractmethod
    def save_diffusers(self, parts: ModelParts, folder: Path, dtype: torch.dtype | None) -> None:
        """Write a Diffusers folder with scheduler and tokenizer; an existing one is replaced as a whole."""

    @abstractmethod
    def adapter_views(self, parts: ModelParts) -> AdapterViews:
        """The modules that network plug-ins attach to."""

    def unet_parameter_blocks(self, parts: ModelParts) -> dict[str, int]:
        """The block of each of the U-Net's parameters by its name in memory, for learning rates by block.

        Raises UserError if the family numbers no blocks.
        """
        raise UserError(f"learning rates by block are not for this kind of model ({self.name})")

    @abstractmethod
    def default_sample_size(self, parts: ModelParts) -> int:
        """Side in pixels of a picture whose size is not said."""

    def markers(self, prediction_type: PredictionType, zero_terminal_snr: bool) -> tuple[str, ...]:
        """Empty tensors by which a single file says what the model predicts; most families have none."""
        return ()

    @abstractmethod
    def base_model_version(self, prediction_type: PredictionType) -> str:
        """Value of the metadata key ss_base_model_version."""

    @abstractmethod
    def modelspec_architecture(self, prediction_type: PredictionType) -> str:
        """Value of modelspec.architecture, without a suffix such as /lora."""

    @abstractmethod
    def modelspec_resolution(self, prediction_type: PredictionType) -> int:
        """Side in pixels written to modelspec.resolution when no resolution was given."""

    def encode_images(self, vae: Any, images_BCHW: Tensor) -> LatentPosterior:
        """Posterior of RGB images in -1..1; its samples are not multiplied by the latent scale."""
        return vae.encode(images_BCHW.to(vae.device, vae.dtype)).latent_dist

    def decode_latents(self, vae: Any, latents_BCHW: Tensor) -> Tensor:
        """RGB images in -1..1 (not clipped) of latents that carry the latent scale, as the U-Net sees them."""
        return vae.decode((latents_BCHW / self.latent_scale).to(vae.device, vae.dtype)).sample
