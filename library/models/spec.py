"""What an architecture is, as plain data: `infer` recognises it in files, `build` makes modules of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PredictionType = Literal["epsilon", "v_prediction"]
FamilyName = Literal["sd1", "sd2", "sdxl"]
TEXT_PARTS = ("text_encoder", "text_encoder_2")
"""Names of the text encoders' parts, as in a Diffusers folder."""
PART_NAMES = (*TEXT_PARTS, "unet", "vae")
WEIGHT_STEMS = {name: "model" if name in TEXT_PARTS else "diffusion_pytorch_model" for name in PART_NAMES}
"""How the weight files in the parts' folders begin."""
PICKLE_STEMS = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
"""How pickled weight files begin, by the stem of those in safetensors."""
SDXL_LATENT_SCALE = 0.13025


@dataclass(frozen=True, slots=True)
class UNetSpec:
    """The denoiser. Tuples have one entry per resolution level, from the widest picture to the smallest.

    ``depths`` counts transformer blocks per attention (0: no attention at this level), ``heads`` are attention heads.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    mid_depth: int = 1
    context_width: int = 768
    linear_projection: bool = False
    layers_per_level: int = 2
    in_channels: int = 4
    out_channels: int = 4
    vector_width: int | None = None  # SDXL: width of the vector condition (pooled text and six sizes)
    size_width: int = 256  # SDXL: width of the embedding of one of these sizes
    sample_size: int = 64  # side of the usual picture in latent cells
    upcast_attention: bool = False


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """A CLIP text encoder. ``layers`` counts those that are kept; ``projection_width`` None: no projection layer."""

    width: int = 768
    mlp_width: int = 3072
    heads: int = 12
    layers: int = 12
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection_width: int | None = None
    vocabulary: int = 49408
    positions: int = 77
    layout: Literal["huggingface", "openclip"] = "huggingface"  # names in a Stability file


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """The picture autoencoder: ``widths`` from the widest picture to the smallest, three halvings for four levels."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_level: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    force_upcast: bool = True  # half precision overflows in it

    @property
    def norm_groups(self) -> int:
        """Groups of the group norms: 32 as published. Where the widths do not allow that, a group has four channels.

        A group of one channel loses its mean; the last norm before the pixels then loses a picture's mean colour.
        """
        return 32 if self.widths[0] % 32 == 0 else self.widths[0] // 4


@dataclass(frozen=True, slots=True)
class ArchitectureSpec:
    """A whole model: which family it belongs to and how wide and deep its parts are."""

    family: FamilyName
    unet: UNetSpec
    text_encoders: tuple[TextEncoderSpec, ...]
    vae: VaeSpec = field(default_factory=VaeSpec)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Names of the text encoders' parts, in the order of ``text_encoders``."""
        return TEXT_PARTS[: len(self.text_encoders)]


SD1 = ArchitectureSpec("sd1", UNetSpec(), (TextEncoderSpec(),))
"""Stable Diffusion 1.x as published."""

SD2 = ArchitectureSpec(
    "sd2",
    UNetSpec(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
    (TextEncoderSpec(1024, 4096, 16, 23, "gelu", layout="openclip"),),
)
"""Stable Diffusion 2.x as published: of the text encoder's 24 layers 23 are kept, so its output is the next to last."""

SDXL = ArchitectureSpec(
    "sdxl",
    UNetSpec(
        widths=(320, 640, 1280),
        depths=(0, 2, 10),
        heads=(5, 10, 20),
        mid_depth=10,
        context_width=2048,
        linear_projection=True,
        vector_width=2816,
        sample_size=128,
    ),
    (
        TextEncoderSpec(),
        TextEncoderSpec(1280, 5120, 20, 32, "gelu", projection_width=1280, layout="openclip"),
    ),
    VaeSpec(scaling_factor=SDXL_LATENT_SCALE),
)
"""SDXL base as published: both text encoders give their next to last state, the second one also a pooled vector."""

FAMILY_TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
BOS_ID = 49406
"""The mark of CLIP's vocabulary that begins each row of tokens."""
EOS_ID = 49407
"""The mark that ends the words of a row."""


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """How the diffusers library draws with models of a family, for the settings of a Diffusers folder.

    ``scheduler``: the family's usual sampler, ``index_entries``: what model_index.json has beside the parts.
    """

    name: str
    scheduler: str
    scheduler_options: Mapping[str, object]
    index_entries: Mapping[str, object]


_SD_PIPELINE = PipelineSpec(
    "StableDiffusionPipeline",
    "DDIMScheduler",
    {"clip_sample": False, "set_alpha_to_one": False},
    {"safety_checker": [None, None], "requires_safety_checker": False},
)
_SDXL_PIPELINE = PipelineSpec(
    "StableDiffusionXLPipeline",
    "EulerDiscreteScheduler",
    {"timestep_spacing": "leading"},
    {"image_encoder": [None, None], "force_zeros_for_empty_prompt": True},
)
PIPELINES: Mapping[FamilyName, PipelineSpec] = {"sd1": _SD_PIPELINE, "sd2": _SD_PIPELINE, "sdxl": _SDXL_PIPELINE}
