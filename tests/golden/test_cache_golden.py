"""Interchange with the reference: its latent archives are read, its pixels are reproduced."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from library.data import buckets
from library.data.cache import LatentStore, target_of
from library.data.images import fit_pixels, read_image
from library.data.records import Augmentation, BucketRules, ImageRecord
from library.training.caching import cache_latents
from tests.data_fixtures import AveragingVae, dataset, record

DATA = Path(__file__).parent / "data" / "cache"
SIZE = (451, 300)
RULES = BucketRules((256, 256), enable_bucket=True, min_bucket_reso=128, max_bucket_reso=512)


class TheirVae(AveragingVae):
    """Gives the reference's latents for its picture."""

    def encode(self, images_BCHW: torch.Tensor) -> SimpleNamespace:
        result = super().encode(images_BCHW)
        with np.load(DATA / "chelsea_sd1.npz") as archive:
            result.latent_dist.mean = torch.from_numpy(archive["latents"]).unsqueeze(0)
        return result


@pytest.fixture
def chelsea(tmp_path: Path) -> ImageRecord:
    """The photo with the archive that the reference wrote for it beside it."""
    shutil.copy(DATA / "chelsea.png", tmp_path / "chelsea.png")
    shutil.copy(DATA / "chelsea_sd1.npz", tmp_path / "chelsea.npz")
    now = time.time_ns()
    os.utime(tmp_path / "chelsea.npz", ns=(now, now))
    return record(tmp_path / "chelsea.png", SIZE)


def test_the_references_archive_serves_without_encoding(chelsea: ImageRecord) -> None:
    fit = buckets.fit(SIZE, RULES, buckets.bucket_sizes(RULES))
    data = dataset([chelsea], [fit], augmentation=Augmentation(flip_aug=True))
    store, vae = LatentStore("sd", "any", to_disk=True), TheirVae()
    (data,), report = cache_latents(
        [data], vae, store, vae_batch_size=1, device=torch.device("cpu"), dtype=torch.float32
    )
    assert (report.reused, len(vae.calls)) == (1, 1)
    with np.load(DATA / "chelsea_sd1.npz") as archive:
        for flipped, name in ((False, "latents"), (True, "latents_flipped")):
            latents = store.load(target_of(chelsea, fit), flipped)
            assert latents.dtype == torch.float32
            assert np.array_equal(latents.numpy(), archive[name])
        assert fit.crop_ltrb == pytest.approx(archive["crop_ltrb"].tolist())


def test_what_we_write_differs_only_in_the_latents_and_the_fingerprint(chelsea: ImageRecord) -> None:
    file = Path(chelsea.path).with_suffix(".npz")
    file.unlink()
    fit = buckets.fit(SIZE, RULES, buckets.bucket_sizes(RULES))
    data = dataset([chelsea], [fit], augmentation=Augmentation(flip_aug=True))
    store = LatentStore("sd", "any", to_disk=True)
    cache_latents([data], AveragingVae(), store, vae_batch_size=1, device=torch.device("cpu"), dtype=torch.float32)
    with np.load(DATA / "chelsea_sd1.npz") as theirs, np.load(file) as ours:
        assert set(ours.files) == {*theirs.files, "fingerprint"}
        for name in theirs.files:
            assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        for name in ("original_size", "crop_ltrb"):
            assert np.allclose(ours[name], theirs[name])


def test_pixels_equal_the_references() -> None:
    with np.load(DATA / "chelsea_resized.npz") as archive:
        expected, meta = archive["pixels"], archive["meta"]
    fit = buckets.fit(SIZE, RULES, buckets.bucket_sizes(RULES))
    assert [*SIZE, *fit.crop_ltrb, *fit.bucket, *fit.resized] == pytest.approx(meta.tolist())
    shown = fit_pixels(read_image(str(DATA / "chelsea.png")), fit).pixels_HWC
    difference = np.abs(shown.astype(int) - expected.astype(int))
    assert shown.shape == expected.shape
    assert difference.mean() < 0.05
    assert difference.max() <= 1
