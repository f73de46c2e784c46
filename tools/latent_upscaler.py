"""Enlarge pictures by a small network that sharpens their latents: for highres fix, and for files by itself.

As ``--highres_fix_upscaler tools.latent_upscaler --highres_fix_upscaler_args weights=FILE`` it enlarges to any size;
run as a program it doubles the size of picture files.

Shapes: B pictures, C = 4 latent channels, H W latent height and width.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.checkpoint.io import atomic_path
from library.command import run_command
from library.log import UserError, progress
from library.options.generation import UpscaleToolOptions
from library.options.scripts import LATENT_UPSCALER
from library.options.settings import Settings

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

FACTOR = 2
PIXEL_STEP = 8
BLOCKS, BLOCKS_OF_GROUP = 20, 4
WIDTH, LAST_WIDTH, CHANNELS = 128, 64, 4


def make_network() -> nn.Module:
    """The network, without weights: latents (B, 4, H, W), not scaled, to sharper ones of the same size."""
    import torch.nn.functional as F
    from torch import nn

    def conv(before: int, after: int) -> nn.Conv2d:
        return nn.Conv2d(before, after, 3, padding=1, bias=False)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH)
            self.conv2, self.bn2 = conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(CHANNELS, WIDTH), nn.BatchNorm2d(WIDTH)
            for number in range(1, BLOCKS + 1):  # the names of the published weights
                self.add_module(f"resblock{number}", Block())
            self.conv2, self.bn2 = conv(WIDTH, LAST_WIDTH), nn.BatchNorm2d(LAST_WIDTH)
            self.conv3, self.bn3 = conv(LAST_WIDTH, LAST_WIDTH), nn.BatchNorm2d(LAST_WIDTH)
            self.conv_final = nn.Conv2d(LAST_WIDTH, CHANNELS, 1)
            nn.init.zeros_(self.conv_final.weight)

        def forward(self, latents_BCHW: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(latents_BCHW)))
            for first in range(1, BLOCKS + 1, BLOCKS_OF_GROUP):
                before = x
                for number in range(first, first + BLOCKS_OF_GROUP):
                    x = self.get_submodule(f"resblock{number}")(x)
                x = x + before
            x = F.relu(self.bn2(self.conv2(x)))
            x = self.bn3(self.conv3(x))
            return latents_BCHW + self.conv_final(x)

    return Network()


def load_network(weights: str) -> nn.Module:
    """The network with the weights of a file, in eval mode. Raises UserError for a file of anything else."""
    from library.checkpoint.io import open_model_file

    network = make_network()
    with open_model_file(weights) as file:
        found = {key: file.tensor(key) for key in file.infos}
    wanted = network.state_dict()
    wrong = sorted(found.keys() ^ wanted.keys()) or [key for key in wanted if found[key].shape != wanted[key].shape]
    if wrong:
        raise UserError(
            f"{weights}: these are not weights of the latent upscaler ({len(wrong)} tensors differ, the first is "
            f"{wrong[0]}); give the file that was made for it"
        )
    network.load_state_dict(found)
    return network.eval().requires_grad_(False)


@dataclass
class LatentUpscaler:
    """What highres fix calls: encodes pictures that Lanczos has enlarged, and sharpens their latents."""

    network: nn.Module

    def to(self, where: torch.device | torch.dtype) -> LatentUpscaler:
        """Move to a device, or change the number type."""
        self.network.to(where)
        return self

    def support_latents(self) -> bool:
        """False: it wants pictures."""
        return False

    def upscale(
        self,
        vae: Any,
        images: Sequence[Image] | None,
        latents: Tensor | None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int,
        vae_batch_size: int,
    ) -> Tensor:
        """Latents (B, 4, height / 8, width / 8) of pictures at a new size, times the VAE's own factor, float32.

        The mean of the VAE's posterior is taken, so the same picture always gives the same latents.
        """
        import torch

        from library.generation.pictures import resized, to_tensor

        if images is None:
            raise ValueError("the latent upscaler works on pictures")
        large = to_tensor([resized(image, (width, height)) for image in images])
        device = vae.device
        encoded = [
            vae.encode(part.to(device, vae.dtype)).latent_dist.mean.float() for part in large.split(vae_batch_size)
        ]
        weight = next(self.network.parameters())
        sharp = [
            self.network(part.to(weight.device, weight.dtype)).float() for part in torch.cat(encoded).split(batch_size)
        ]
        return torch.cat(sharp) * vae.config.scaling_factor


def create_upscaler(*, weights: str) -> LatentUpscaler:
    """The upscaler with the weights of a file. Raises UserError."""
    return LatentUpscaler(load_network(weights))


def enlarge_files(options: UpscaleToolOptions) -> list[Path]:
    """Write each picture of the pattern at twice its size; returns the new files. Raises UserError."""
    import torch

    from library.device import choose_device
    from library.models.load import Target, load_vae

    pattern = str(Path(str(options.image_pattern)).expanduser())
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not paths:
        raise UserError(f"--image_pattern {options.image_pattern}: no file fits")
    _refuse_equal_names(paths)
    device = choose_device()
    vae = load_vae(Path(str(options.vae_path)).expanduser(), Target(torch.float32, device), "--vae_path")
    upscaler = create_upscaler(weights=str(options.weights)).to(device)
    written: list[Path] = []
    with torch.no_grad(), progress(len(paths), "pictures") as bar:
        for batch in _batches(paths, options.batch_size):
            written += _enlarge(batch, vae, upscaler, options)
            for _ in batch:
                bar.advance()
    return written


def _refuse_equal_names(paths: Sequence[Path]) -> None:
    """All results stand in one folder, so pictures of one name in several folders would take each other's place."""
    first: dict[str, Path] = {}
    twice = [(first[path.name], path) for path in paths if first.setdefault(path.name, path) != path]
    if twice:
        raise UserError.of(
            f"--image_pattern: {one} and {other} would both be written as {one.stem}_upscaled{one.suffix}; enlarge "
            "them one after the other, each with its own --output_dir"
            for one, other in twice
        )


def _batches(paths: Sequence[Path], size: int) -> Iterator[list[tuple[Path, Image]]]:
    """Neighbours of one size, cut to multiples of 8."""
    from library.generation.pictures import read_picture

    batch: list[tuple[Path, Image]] = []
    for path in paths:
        picture = read_picture(str(path))
        width, height = (side // PIXEL_STEP * PIXEL_STEP for side in picture.size)
        if not width or not height:
            raise UserError(f"{path}: a picture must have at least {PIXEL_STEP} pixels on each side")
        picture = picture.crop((0, 0, width, height))
        if batch and (len(batch) == size or batch[-1][1].size != picture.size):
            yield batch
            batch = []
        batch.append((path, picture))
    if batch:
        yield batch


def _enlarge(
    batch: Sequence[tuple[Path, Image]], vae: Any, upscaler: LatentUpscaler, options: UpscaleToolOptions
) -> list[Path]:
    import torch

    from library.generation.pictures import resized, to_picture

    images = [picture for _, picture in batch]
    width, height = (side * FACTOR for side in images[0].size)
    count = options.vae_batch_size
    latents = upscaler.upscale(vae, images, None, torch.float32, width, height, len(images), count)
    decoded = [vae.decode(part / vae.config.scaling_factor).sample.cpu() for part in latents.split(count)]
    written: list[Path] = []
    for (path, picture), pixels_CHW in zip(batch, torch.cat(decoded), strict=True):
        results = {"upscaled": to_picture(pixels_CHW[None])}
        if options.debug:
            results["lanczos4"] = resized(picture, (width, height))
        for name, result in results.items():
            target = Path(options.output_dir).expanduser() / f"{path.stem}_{name}{path.suffix}"
            with atomic_path(target, durable=False) as temporary:
                result.save(temporary, quality=95)
            written.append(target)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Enlarge the files that the options name; returns the exit status."""
    return run_command(LATENT_UPSCALER, _work, argv)


def _work(settings: Settings) -> int:
    enlarge_files(settings[UpscaleToolOptions])
    return 0


if __name__ == "__main__":
    sys.exit(main())
