"""Latents of a batch as the U-Net sees them: scaled, drawn by the sample's own seed, finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.log import UserError
from library.training.latent_source import LatentSource
from tests.data_fixtures import AveragingVae

SCALE = 0.25


class Vae(AveragingVae):
    """With the attribute that the model library's class has."""

    @property
    def dtype(self) -> torch.dtype:
        return self.gain.dtype


def source(vae: AveragingVae) -> LatentSource:
    family: Any = SimpleNamespace(
        latent_scale=SCALE, encode_images=lambda vae, images: vae.encode(images.to(vae.dtype)).latent_dist
    )
    return LatentSource(family, vae, torch.device("cpu"))


def batch(images: Tensor | None = None, latents: Tensor | None = None, seeds: tuple[int, ...] = (1, 2, 3)) -> Any:
    return SimpleNamespace(
        images_BCHW=images, latents_BCHW=latents, seeds=seeds, keys=tuple(f"{seed}.png" for seed in seeds)
    )


IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_cached_latents_are_scaled_in_float32() -> None:
    latents = torch.randn(3, 4, 8, 8).half()
    found = source(Vae())(batch(latents=latents))
    assert found.dtype == torch.float32
    assert torch.equal(found, latents.float() * SCALE)


def test_pictures_give_a_scaled_draw_of_the_posterior() -> None:
    mean = nn.functional.avg_pool2d(IMAGES, 8)
    without = source(Vae())(batch(IMAGES))
    torch.testing.assert_close(without[:, :3], mean * SCALE)
    noise = (source(Vae(deviation=2.0))(batch(IMAGES)) - without) / (2 * SCALE)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert noise.mean().item() == pytest.approx(0, abs=0.1)


def test_a_draw_is_its_samples_own() -> None:
    together = source(Vae(deviation=1.0))(batch(IMAGES))
    torch.manual_seed(9)
    alone = source(Vae(deviation=1.0))(batch(IMAGES[1:2], seeds=(2,)))
    assert torch.equal(alone[0], together[1])
    again = source(Vae(deviation=1.0))(batch(IMAGES[1:2], seeds=(4,)))
    assert not torch.allclose(again, alone)


def test_what_overflows_goes_through_again_in_float32() -> None:
    bright = IMAGES.clone()
    bright[1] = 0.99
    vae = Vae(overflow_above=0.9).half()
    work = source(vae)
    found = work(batch(bright))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, :3], nn.functional.avg_pool2d(bright, 8) * SCALE, atol=1e-6, rtol=1e-5)
    assert vae.dtype == torch.float16  # as it was
    assert "2.png" in work.float32_retries


def test_latents_that_are_never_finite_are_named() -> None:
    images = IMAGES.clone()
    images[2] = float("nan")
    with pytest.raises(UserError, match=r"no finite latents for 3\.png,"):
        source(Vae())(batch(images))
