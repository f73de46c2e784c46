"""Trains the VAE of the built-in model on drawn scenes; writes the start of the whole: VAE, fresh text encoder, U-Net.

The work is saved every 100 steps in ``--work_dir``; started again, it goes on there.

Shapes: B batch, C channels, H W pixels or latent cells (an eighth).
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.checkpoint.io import atomic_path
from library.log import progress, setup_logging
from library.models.build import text_config, unet_config, vae_config
from library.models.save import save_single_file
from library.models.spec import ArchitectureSpec, TextEncoderSpec, UNetSpec, VaeSpec
from library.rng import seed_of, stream, torch_stream
from library.scenes.drawing import Picture, draw, polygon_mask
from library.scenes.making import random_scene
from library.scenes.world import COLOURS
from library.training.muon import Muon

PIXELS = 64
BATCH = 16
LATENT_SCALE = 0.18215
KL_WEIGHT = 1e-4
PEAK_RATE = 1e-2
SAVE_EVERY_N_STEPS = 100
PHOTO_SHARE, POLYGON_SHARE = 0.05, 0.25
TINY = ArchitectureSpec(
    "sd1",
    UNetSpec(widths=(64, 96, 96, 32), context_width=64, sample_size=PIXELS // 8),
    (TextEncoderSpec(width=64, mlp_width=256, heads=1, layers=4),),
    VaeSpec(widths=(16, 32, 64, 96), layers_per_level=1),
)


@dataclass(frozen=True)
class TinyVaeOptions:
    """What to train on, for how long, and where the work is kept."""

    photos: Path
    work_dir: Path
    target: Path
    steps: int
    seed: int


class VaeTraining:
    """The VAE, the average of its weights, the optimizer and the step reached; kept in one file."""

    def __init__(self, options: TinyVaeOptions):
        torch.manual_seed(seed_of(options.seed, "vae"))
        self.vae: Any = AutoencoderKL(**vae_config(TINY.vae))
        self.averaged: Any = copy.deepcopy(self.vae).requires_grad_(False)
        self.optimizer = Muon(self.vae.parameters(), lr=PEAK_RATE)
        self.step = 0
        self.file = options.work_dir / f"vae_{options.seed}.pt"  # another seed is another work
        if self.file.exists():
            state: dict[str, Any] = torch.load(self.file, weights_only=True)
            self.vae.load_state_dict(state["vae"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        """Write the state; whole or not at all."""
        state = {"vae": self.vae.state_dict(), "averaged": self.averaged.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step}
        with atomic_path(self.file) as part:
            torch.save(state, part)

    def update(self, loss: Tensor, rate: float) -> None:
        """Backward, one optimizer step, one step of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(0.998, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.vae.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)


def training_picture(rng: random.Random, photos: list[Image.Image]) -> Picture:
    """A scene, a random polygon (forms that no scene has), or a crop of a photo."""
    kind = rng.random()
    if kind < PHOTO_SHARE:
        photo = rng.choice(photos)
        side = min(photo.size) * rng.uniform(0.5, 1.0)
        left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        box = (left, top, left + side, top + side)
        return np.asarray(photo.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS, box=box))
    picture = draw(random_scene(rng), rng, PIXELS)
    if kind < PHOTO_SHARE + POLYGON_SHARE:
        corners = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 9)))
        lengths = [rng.uniform(0.4, 1.0) for _ in corners]
        points = [(r * math.cos(a), r * math.sin(a)) for a, r in zip(corners, lengths, strict=True)]
        centre = (rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75))
        mask = polygon_mask([points], None, centre, rng.uniform(0.15, 0.4), PIXELS)[..., None]
        colour = np.array(COLOURS[rng.choice(tuple(COLOURS))], np.float32)
        picture = (picture * (1 - mask) + colour * mask).astype(np.uint8)
    if rng.random() < 0.05:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 2)).astype(np.uint8)
    return picture


def to_tensor(pictures: list[Picture]) -> Tensor:
    """(B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_loss(made_BCHW: Tensor, wanted_BCHW: Tensor) -> Tensor:
    """Absolute difference of pixels and of edges (neighbours' steps), squared difference of mean colours."""
    loss = F.l1_loss(made_BCHW, wanted_BCHW)
    loss = loss + 5 * F.mse_loss(F.avg_pool2d(made_BCHW, 8), F.avg_pool2d(wanted_BCHW, 8))
    for dim in (2, 3):
        loss = loss + F.l1_loss(made_BCHW.diff(dim=dim), wanted_BCHW.diff(dim=dim))
    return loss


def train_vae(options: TinyVaeOptions, photos: list[Image.Image]) -> Any:
    """Train up to ``options.steps``; the averaged VAE."""
    training = VaeTraining(options)
    vae = training.vae
    with progress(options.steps, "VAE") as bar:
        bar.advance(training.step)
        while training.step < options.steps:
            step = training.step
            rng = stream(options.seed, "vae pictures", step)
            wanted = to_tensor([training_picture(rng, photos) for _ in range(BATCH)])
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(wanted).latent_dist
                latents = posterior.mean + posterior.std * torch.randn(
                    posterior.mean.shape, generator=torch_stream(options.seed, "vae noise", step)
                )
                made = vae.decode(latents).sample
            loss = picture_loss(made.float(), wanted)
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
            training.update(loss + KL_WEIGHT * kl, PEAK_RATE * min((step + 1) / 100, 1.0) * (0.02 + 0.98 * cosine))
            bar.advance(1)
            if training.step % SAVE_EVERY_N_STEPS == 0 or training.step == options.steps:
                training.save()
                error = F.mse_loss(made.detach().float(), wanted).item()
                print(f"step {training.step}: loss {loss.item():.4f}, squared error {error:.5f}", flush=True)
    return training.averaged.eval()


@torch.no_grad()
def normalise_latents(vae: Any, pictures_BCHW: Tensor) -> None:
    """Shift and scale the latent channels to mean 0 and deviation 1 / LATENT_SCALE, without changing any picture."""
    mean_BCHW = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pictures_BCHW.split(50)])
    shift_C = mean_BCHW.mean(dim=(0, 2, 3))
    scale_C = 1 / LATENT_SCALE / mean_BCHW.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift_C
    post.weight /= scale_C[None, :, None, None]
    quant.bias[:4] -= shift_C
    quant.weight[:4] *= scale_C[:, None, None, None]
    quant.bias[:4] *= scale_C
    quant.bias[4:] += 2 * scale_C.log()


def fresh_parts(seed: int) -> dict[str, nn.Module]:
    """Text encoder and U-Net with random weights: SD1's structure, narrow."""
    torch.manual_seed(seed_of(seed, "text encoder and U-Net"))
    text = CLIPTextModel(CLIPTextConfig(**text_config(TINY.text_encoders[0])))
    # Words that the training never sees must still be told apart by an adapter: keep their vectors well above zero.
    words: Any = text.get_input_embeddings()
    nn.init.normal_(words.weight, std=0.1)
    return {"text_encoder": text, "unet": UNet2DConditionModel(**unet_config(TINY.unet))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the VAE of the small built-in model; write the model's start.")
    parser.add_argument("--photos", type=Path, default=Path("examples/photos"), help="some photos, for variety")
    parser.add_argument("--work_dir", type=Path, default=Path("output/tiny"), help="where the work is kept")
    parser.add_argument("--target", type=Path, default=Path("output/tiny/start.safetensors"), help="file to write")
    parser.add_argument("--steps", type=int, default=3600, help="steps of the VAE's training")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything that is drawn")
    options = TinyVaeOptions(**vars(parser.parse_args()))
    setup_logging()
    photos = [Image.open(path).convert("RGB") for path in sorted(options.photos.rglob("*.jpg"))]
    if not photos:
        parser.error(f"--photos {options.photos}: there are no .jpg pictures; name a folder that has some")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    vae = train_vae(options, photos)
    rng = stream(options.seed, "normalise")
    normalise_latents(vae, to_tensor([draw(random_scene(rng), rng, PIXELS) for _ in range(400)]))
    save_single_file(options.target, TINY, {**fresh_parts(options.seed), "vae": vae}, torch.float32)
    print(f"{options.target}: {options.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
