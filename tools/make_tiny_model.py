"""Trains the small SD1-shaped model of ``examples/tiny`` on the example photos and drawn shapes, at 64 x 64 pixels.

Two stages, each with a budget of processor minutes: first the VAE, then text encoder and U-Net together. The work is
saved every minute in ``--work_dir``; started again, it goes on there. ``--export_only`` writes what is there.

Shapes: B batch, C channels, H W pixels or latent cells (an eighth), T tokens.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.checkpoint.io import atomic_path
from library.models.build import text_config, unet_config, vae_config
from library.models.save import save_single_file
from library.models.spec import ArchitectureSpec, TextEncoderSpec, UNetSpec, VaeSpec
from library.text.tokenizer import clip_tokenizer

PIXELS = 64
LATENT_SCALE = 0.18215
TOKENS = 77
TINY = ArchitectureSpec(
    "sd1",
    UNetSpec(widths=(32, 64, 64, 64), context_width=32, sample_size=PIXELS // 8),
    (TextEncoderSpec(width=32, mlp_width=128, heads=1, layers=2),),
    VaeSpec(widths=(32, 32, 64, 64)),
)
# One colour a shape: 32 channels in 32 norm groups lose an image's mean colour, so the VAE must tell it by the form.
SHAPES = {"circle": ("red", (214, 40, 40)), "square": ("blue", (38, 84, 200)), "triangle": ("green", (42, 157, 68))}
GROUNDS = {"white": (240, 240, 240), "black": (20, 20, 20)}
TEXTURES = ("grass", "gravel", "bricks")


@dataclass(frozen=True)
class TinyOptions:
    """What to train on, for how long, and where the work is kept."""

    photos: Path
    work_dir: Path
    target: Path
    vae_minutes: float
    model_minutes: float
    export_only: bool


def load_photos(folder: Path) -> list[tuple[Image.Image, str]]:
    """Every picture below ``folder`` with the caption that stands beside it."""
    found = sorted(folder.rglob("*.jpg"))
    return [(Image.open(path).convert("RGB"), path.with_suffix(".txt").read_text("utf-8").strip()) for path in found]


def crop_photo(photo: Image.Image, rng: random.Random, smallest: float) -> Image.Image:
    """A square of ``smallest``..1 of the short side, near the centre, at the training size."""
    side = min(photo.size) * rng.uniform(smallest, 1.0)
    left = (photo.width - side) * (0.5 + rng.uniform(-0.25, 0.25))
    top = (photo.height - side) * (0.5 + rng.uniform(-0.25, 0.25))
    box = (left, top, left + side, top + side)
    return photo.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS, box=box)


def draw_shape(rng: random.Random) -> tuple[Image.Image, str]:
    """A coloured shape on a plain ground, and its caption."""
    shape, ground = rng.choice(list(SHAPES)), rng.choice(list(GROUNDS))
    colour, fill = SHAPES[shape]
    size, unit = PIXELS * 4, PIXELS * 4 / 100
    picture = Image.new("RGB", (size, size), GROUNDS[ground])
    draw = ImageDraw.Draw(picture)
    radius = rng.uniform(26, 34) * unit
    x, y = size / 2 + rng.uniform(-6, 6) * unit, size / 2 + rng.uniform(-6, 6) * unit
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
    return picture.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS), f"a {colour} {shape} on a {ground} background"


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """(B, 3, H, W) in -1..1."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def build_parts() -> nn.ModuleDict:
    """Text encoder, U-Net and VAE with fresh weights: SD1's structure, narrow."""
    text = CLIPTextModel(CLIPTextConfig(**text_config(TINY.text_encoders[0])))
    # Words that the training never sees must still be told apart by an adapter: keep their vectors well above zero.
    words: Any = text.get_input_embeddings()
    nn.init.normal_(words.weight, std=0.1)
    unet = UNet2DConditionModel(**unet_config(TINY.unet))
    vae = AutoencoderKL(**vae_config(TINY.vae))
    return nn.ModuleDict({"text_encoder": text, "unet": unet, "vae": vae})


class Stage:
    """One stage's training state: optimizer, averaged weights, used seconds; the learning rate follows the budget."""

    def __init__(self, modules: list[nn.Module], peak_rate: float, minutes: float, file: Path):
        self.modules = nn.ModuleList(modules)
        self.averaged = copy.deepcopy(self.modules).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=peak_rate, weight_decay=0.0, fused=True)
        self.peak_rate, self.budget, self.file = peak_rate, minutes * 60, file
        self.seconds, self.steps = 0.0, 0
        self._clock = self._saved_at = time.process_time()
        if file.exists():
            state: dict[str, Any] = torch.load(file, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.seconds, self.steps = state["seconds"], state["steps"]

    @property
    def done(self) -> bool:
        return self.seconds >= self.budget

    def step(self, loss: Tensor) -> None:
        """Backward, update, average, and a save when one is due."""
        progress = min(self.seconds / self.budget, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        rate = self.peak_rate * min((self.steps + 1) / 200, 1.0) * (0.03 + 0.97 * cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        decay = min(0.998, (1 + self.steps) / (20 + self.steps))
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.modules.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        now = time.process_time()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        if self.steps % 100 == 0:
            minutes = self.seconds / 60
            print(f"{self.file.stem}: step {self.steps}, {minutes:.1f} min, loss {loss.item():.4f}", flush=True)
        if now - self._saved_at > 60 or self.done:
            self._saved_at = now
            self.save()

    def save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds,
            "steps": self.steps,
        }
        with atomic_path(self.file) as part:
            torch.save(state, part)


def picture_loss(made_BCHW: Tensor, wanted_BCHW: Tensor) -> Tensor:
    """Absolute difference of pixels and of edges (neighbours' steps), squared difference of mean colours."""
    loss = F.l1_loss(made_BCHW, wanted_BCHW)
    loss = loss + 5 * F.mse_loss(F.avg_pool2d(made_BCHW, 8), F.avg_pool2d(wanted_BCHW, 8))
    for dim in (2, 3):
        loss = loss + F.l1_loss(made_BCHW.diff(dim=dim), wanted_BCHW.diff(dim=dim))
    return loss


def train_vae(stage: Stage, photos: list[tuple[Image.Image, str]], batch: int = 4) -> None:
    """Reconstruct crops of all photos and shapes; a small KL term keeps the latents smooth."""
    vae: Any = stage.modules[0]
    rng = random.Random(stage.steps + 1)
    # Many crops show the cat or the cup; fine textures are beyond 256 numbers a picture and only take capacity.
    weights = [0.2 if caption.split()[-1] in TEXTURES else 0.5 if "sks" in caption else 1.0 for _, caption in photos]
    while not stage.done:
        chosen = rng.choices(photos, weights, k=batch)
        pictures = [crop_photo(photo, rng, 0.8) if rng.random() < 0.65 else draw_shape(rng)[0] for photo, _ in chosen]
        wanted = to_tensor(pictures)
        posterior = vae.encode(wanted).latent_dist
        made = vae.decode(posterior.sample()).sample
        stage.step(picture_loss(made, wanted) + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel())


@torch.no_grad()
def normalise_latents(vae: Any, photos: list[tuple[Image.Image, str]]) -> None:
    """Shift and scale the latent channels to mean 0 and deviation 1 / LATENT_SCALE, without changing any picture."""
    rng = random.Random(0)
    crops = to_tensor([crop_photo(photo, rng, 0.8) for photo, _ in photos for _ in range(4)])
    mean_BCHW = vae.encode(crops).latent_dist.mean
    shift_C = mean_BCHW.mean(dim=(0, 2, 3))
    scale_C = 1 / LATENT_SCALE / mean_BCHW.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift_C
    post.weight /= scale_C[None, :, None, None]
    quant.bias[:4] -= shift_C
    quant.weight[:4] *= scale_C[:, None, None, None]
    quant.bias[:4] *= scale_C
    quant.bias[4:] += 2 * scale_C.log()


@torch.no_grad()
def latent_pool(vae: Any, photos: list[tuple[Image.Image, str]], size: int) -> tuple[Tensor, list[str]]:
    """``size`` encoded pictures (B, 4, H, W) and their captions: subjects and shapes, not the cat or the cup."""
    subjects = [(photo, caption) for photo, caption in photos if "sks" not in caption]
    rng = random.Random(1)
    pictures: list[Image.Image] = []
    captions: list[str] = []
    for _ in range(size):
        if rng.random() < 0.65:
            photo, caption = rng.choice(subjects)
            picture = crop_photo(photo, rng, 0.9)
        else:
            picture, caption = draw_shape(rng)
        pictures.append(picture)
        captions.append(caption)
    chunks = [vae.encode(to_tensor(pictures[i : i + 50])).latent_dist.mean for i in range(0, size, 50)]
    return torch.cat(chunks) * LATENT_SCALE, captions


def reword(caption: str, rng: random.Random) -> str:
    """The caption in one of a few wordings; empty one time in ten (for guidance)."""
    if rng.random() < 0.1:
        return ""
    return caption.replace("a photo of", rng.choice(("a photo of", "a photo of", "a picture of", ""))).strip()


def train_model(stage: Stage, latents_BCHW: Tensor, captions: list[str], batch: int = 32) -> None:
    """Text encoder and U-Net: predict the noise, weighted as min-SNR-5 does (arXiv 2303.09556)."""
    text, unet = (module for module in stage.modules)
    tokenizer = clip_tokenizer()
    rng = random.Random(stage.steps + 1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    text.train()
    unet.train()
    while not stage.done:
        rows = [rng.randrange(len(captions)) for _ in range(batch)]
        wording = [reword(captions[row], rng) for row in rows]
        ids_BT = tokenizer(wording, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        noise = torch.randn(batch, *latents_BCHW.shape[1:])
        timesteps_B = torch.randint(0, 1000, (batch,))
        alpha_B = alphas_cumprod[timesteps_B][:, None, None, None]
        noisy = alpha_B.sqrt() * latents_BCHW[rows] + (1 - alpha_B).sqrt() * noise
        hidden_BTD = text(ids_BT).last_hidden_state
        predicted = unet(noisy, timesteps_B, hidden_BTD).sample
        snr_B = (alpha_B / (1 - alpha_B)).flatten()
        losses_B = (predicted - noise).pow(2).mean(dim=(1, 2, 3)) * (snr_B.clamp(max=5) / snr_B)
        stage.step(losses_B.mean())


def train(options: TinyOptions) -> nn.ModuleDict:
    """Run or finish both stages; the averaged weights of each."""
    options.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    photos = load_photos(options.photos)
    parts = build_parts()
    vae_minutes, model_minutes = (0.0, 0.0) if options.export_only else (options.vae_minutes, options.model_minutes)
    vae_stage = Stage([parts["vae"]], 2e-3, vae_minutes, options.work_dir / "vae.pt")
    train_vae(vae_stage, photos)
    vae = vae_stage.averaged[0].eval()
    normalise_latents(vae, photos)
    model_stage = Stage([parts["text_encoder"], parts["unet"]], 2e-3, model_minutes, options.work_dir / "model.pt")
    if not model_stage.done:
        train_model(model_stage, *latent_pool(vae, photos, 2000))
    text, unet = model_stage.averaged
    return nn.ModuleDict({"text_encoder": text.eval(), "unet": unet.eval(), "vae": vae})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small built-in model.")
    parser.add_argument("--photos", type=Path, default=Path("examples/photos"), help="pictures with captions")
    parser.add_argument("--work_dir", type=Path, default=Path("output/tiny_model"), help="where the work is kept")
    parser.add_argument("--target", type=Path, default=Path("examples/tiny/tiny-sd1.safetensors"), help="file to write")
    parser.add_argument("--vae_minutes", type=float, default=20.0, help="processor minutes for the VAE")
    parser.add_argument("--model_minutes", type=float, default=25.0, help="processor minutes for the rest")
    parser.add_argument("--export_only", action="store_true", help="write what is there, without training")
    options = TinyOptions(**vars(parser.parse_args()))
    parts = train(options)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    save_single_file(options.target, TINY, dict(parts.items()), torch.float16)
    print(f"{options.target}: {options.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
