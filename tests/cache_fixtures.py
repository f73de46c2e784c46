"""What tests of the latent cache share: stores, one-image data sets, and caching with small settings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from library.data.cache import LatentStore, target_of
from library.data.records import ResolvedDataset
from library.training.caching import CachingReport, cache_latents
from tests.data_fixtures import AveragingVae, cover_fit, dataset, record, write_picture

CPU = torch.device("cpu")


def disk_store(vae: str = "vae-1", family: str = "sd") -> LatentStore:
    return LatentStore(family, vae, to_disk=True)


def run(
    datasets: list[ResolvedDataset], store: LatentStore, vae: nn.Module | None = None, **options: object
) -> tuple[tuple[ResolvedDataset, ...], CachingReport]:
    settings = {"vae_batch_size": 2, "device": CPU, "dtype": torch.float32, "workers": 2} | options
    return cache_latents(datasets, vae or AveragingVae(), store, **settings)  # type: ignore[arg-type]


def one_image(
    folder: Path,
    name: str = "a.png",
    size: tuple[int, int] = (80, 64),
    bucket: tuple[int, int] = (64, 64),
    **more: object,
) -> ResolvedDataset:
    path = folder / name
    if not path.exists():
        write_picture(path, size)
    return dataset([record(path, size)], [cover_fit(size, bucket)], **more)  # type: ignore[arg-type]


def archives(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npz"))


def latents_of(data: ResolvedDataset, store: LatentStore, flipped: bool = False, index: int = 0) -> torch.Tensor:
    return store.load(target_of(data.records[index], data.fits[index]), flipped)
