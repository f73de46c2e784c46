"""From a prompt to a picture, by the family's own ``encode`` and ``predict``: previews and training cannot drift apart.

Each picture has a generator of its own on the CPU, so it is the same alone or among others, nearly so on every device.
Shapes: B = 2 with guidance (negative first, then the prompt), else 1; C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.diffusion.schedule import NoiseSchedule
from library.families.base import Geometry, ModelFamily, ModelParts, TextCondition
from library.generation.denoise import Denoising, Guidance, GuidedUNet, starting_noise
from library.generation.prompts import PromptSpec
from library.generation.samplers import make_sampler
from library.rng import fresh_seed
from library.text.tokens import TextSettings

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_PROMPT_TOKENS = 225
SIZE_STEP = 8
MIN_SIZE = 64


@dataclass(frozen=True)
class GenerationSettings:
    """What holds for all pictures. ``dtype`` is the U-Net's input type, ``precision`` opens the autocast region."""

    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype = torch.float32
    clip_skip: int | None = None
    default_sampler: str = "ddim"
    precision: Callable[[], AbstractContextManager[object]] = nullcontext


def generate(family: ModelFamily, parts: ModelParts, prompt: PromptSpec, settings: GenerationSettings) -> Image:
    """Draw one picture. Prompts understand weights and BREAK, up to 225 tokens. Modules keep their mode and device;
    a VAE or text encoders that are elsewhere come to the settings' device only while they work."""
    return to_picture(draw(family, parts, prompt, settings))


@torch.no_grad()
def draw(family: ModelFamily, parts: ModelParts, prompt: PromptSpec, settings: GenerationSettings) -> Tensor:
    """The picture as (1, 3, pixels, pixels) in -1..1, not clipped, float32, on the CPU."""
    width, height = picture_size(family, parts, prompt)
    seed = fresh_seed() if prompt.seed is None else prompt.seed
    generator = torch.Generator("cpu").manual_seed(seed)
    with settings.precision():
        condition = encode_prompt(family, parts, prompt, settings)
        latents_BCHW = _denoise(family, parts, prompt, settings, condition, (width, height), generator)
    return decode(family, parts, latents_BCHW, settings.device)


def picture_size(family: ModelFamily, parts: ModelParts, prompt: PromptSpec) -> tuple[int, int]:
    """(width, height) in pixels: multiples of 8, at least 64; the family's usual size where the prompt says nothing."""
    usual = family.default_sample_size(parts)
    width, height = (max(MIN_SIZE, (side or usual) // SIZE_STEP * SIZE_STEP) for side in (prompt.width, prompt.height))
    return width, height


def encode_prompt(
    family: ModelFamily, parts: ModelParts, prompt: PromptSpec, settings: GenerationSettings
) -> TextCondition:
    """The condition of [negative prompt, prompt], or of the prompt alone where the scale needs no guidance."""
    texts = [prompt.negative_prompt, prompt.prompt] if prompt.scale > 1 else [prompt.prompt]
    text_settings = TextSettings(
        max_token_length=LONGEST_PROMPT_TOKENS,
        clip_skip=settings.clip_skip,
        weighted_captions=True,
        breaks=True,
        shrink=True,
    )
    tokens = family.tokenize(texts, text_settings)
    with on_device(parts.text_encoders, settings.device):
        return family.encode(parts.text_encoders, tokens, text_settings).to(settings.device, settings.dtype)


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Generator[None]:
    """Modules on the device meanwhile, for those that live elsewhere to leave it free."""
    homes = [(module, next(module.parameters()).device) for module in modules]
    try:
        for module, _ in homes:
            module.to(device)
        yield
    finally:
        for module, home in homes:
            module.to(home)


def _denoise(
    family: ModelFamily,
    parts: ModelParts,
    prompt: PromptSpec,
    settings: GenerationSettings,
    condition: TextCondition,
    size: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """Latents (1, C, H, W) in float32, carrying the latent scale."""
    name = prompt.sample_sampler or settings.default_sampler
    sampler = make_sampler(name, prompt.sample_steps, settings.schedule, settings.device)
    cells_hw = (size[1] // family.latent_factor, size[0] // family.latent_factor)
    noise_BCHW = starting_noise((family.latent_channels, *cells_hw), [generator], settings.device)
    latents_BCHW = noise_BCHW * sampler.initial_scale
    guidance = Guidance(prompt.scale)
    predict = GuidedUNet(
        family,
        parts.unet,
        sampler,
        condition,
        _geometry(size, guidance.copies, settings.device),
        guidance,
        settings.dtype,
    )
    return Denoising(sampler, predict, [generator]).run(latents_BCHW)


def _geometry(size: tuple[int, int], copies: int, device: torch.device) -> Geometry:
    """The picture as if it were an uncropped original of its own size."""
    size_hw_B2 = torch.tensor([[size[1], size[0]]], device=device).repeat(copies, 1)
    return Geometry(size_hw_B2, torch.zeros_like(size_hw_B2), size_hw_B2)


def decode(family: ModelFamily, parts: ModelParts, latents_BCHW: Tensor, device: torch.device) -> Tensor:
    """RGB images in -1..1 (not clipped), float32, on the CPU.

    Half precision can overflow in the VAE and leave a black picture: such an image is decoded again in float32.
    """
    vae = parts.vae
    images_BCHW = _with_vae(vae, device, lambda: family.decode_latents(vae, latents_BCHW), _is_broken)
    return images_BCHW.float().cpu()


@torch.no_grad()
def encode(family: ModelFamily, parts: ModelParts, images_BCHW: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, C, H, W) of the latents of RGB images in -1..1, without the latent scale, float32, on the
    CPU. What overflows in half precision is encoded again in float32.
    """
    vae = parts.vae

    def work() -> Tensor:
        posterior = family.encode_images(vae, images_BCHW)
        return torch.stack([posterior.mean, posterior.std])

    found_2BCHW = _with_vae(vae, device, work, lambda found: not bool(found.isfinite().all()))
    mean_BCHW, std_BCHW = found_2BCHW.float().cpu()
    return mean_BCHW, std_BCHW


def _with_vae(
    vae: Any, device: torch.device, work: Callable[[], Tensor], is_broken: Callable[[Tensor], bool]
) -> Tensor:
    """What ``work`` gives with the VAE on a device; once more in float32 if it is broken in half precision."""
    home, dtype = vae.device, vae.dtype
    try:
        nn.Module.to(vae, device)  # the library's own `to` warns at every call
        with torch.autocast(device.type, enabled=False):
            result = work()
            if dtype != torch.float32 and is_broken(result):
                nn.Module.to(vae, torch.float32)
                result = work()
    finally:
        nn.Module.to(vae, home, dtype)
    return result


def _is_broken(images_BCHW: Tensor) -> bool:
    """Not finite, or one flat colour."""
    return not bool(images_BCHW.isfinite().all()) or bool(images_BCHW.max() == images_BCHW.min())


def to_picture(images_BCHW: Tensor) -> Image:
    """The first image of a batch in -1..1 as an 8-bit picture."""
    from PIL import Image as PilImage

    pixels_HWC = ((images_BCHW[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return PilImage.fromarray(pixels_HWC.numpy())
