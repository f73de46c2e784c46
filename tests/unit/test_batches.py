"""Batches: what reaches the training step, whatever the arrangement of workers, processes and caches."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache import LatentStore
from library.data.dataset import TrainImages
from library.data.debug_sheet import write_debug_sheets
from library.data.loader import prefetch
from library.data.plan import plan_epoch
from library.data.records import (
    Augmentation,
    Batch,
    CaptionClock,
    CaptionRules,
    MicroBatch,
    ResolvedDataset,
    Sample,
)
from library.log import UserError
from library.training.caching import cache_latents
from tests.data_fixtures import AveragingVae, cover_fit, dataset, picture, record, write_picture

CLOCK = CaptionClock(epoch=1, step=0, max_train_steps=10)
LIVELY = Augmentation(flip_aug=True, random_crop=True, color_aug=True)


def many_images(
    folder: Path, count: int = 7, augmentation: Augmentation | None = None, reg_from: int = 99, **more: object
) -> ResolvedDataset:
    sizes = [(80, 64) if index % 3 else (64, 80) for index in range(count)]
    paths = [write_picture(folder / f"{index}.png", size, index) for index, size in enumerate(sizes)]
    records = [
        replace(record(path, size, reg=index >= reg_from), repeats=2)
        for index, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]
    fits = [cover_fit(size, (64, 32) if size[0] > size[1] else (32, 64)) for size in sizes]
    captions = CaptionRules(shuffle_caption=True, caption_dropout_rate=0.2)
    return dataset(records, fits, augmentation=augmentation or LIVELY, captions=captions, **more)  # type: ignore[arg-type]


def micros(data: ResolvedDataset, processes: int = 1, seed: int = 3, epoch: int = 1) -> list[MicroBatch]:
    return [micro for step in plan_epoch([data], seed, epoch, processes, 1) for micro in step.micro_batches]


def samples_of(batch: Batch) -> dict[int, tuple[object, ...]]:
    """What each sample of a batch is, by its seed."""
    data = batch.images_BCHW if batch.images_BCHW is not None else batch.latents_BCHW
    assert data is not None
    return {
        seed: (
            batch.keys[index],
            batch.captions[index],
            batch.flipped[index],
            batch.crop_top_lefts_B2[index].tolist(),
            data[index].numpy().tobytes(),
        )
        for index, seed in enumerate(batch.seeds)
    }


def test_fields_and_types(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (80, 64))
    data = dataset([record(path, (80, 64), key="k")], [cover_fit((80, 64), (64, 32))])
    data = replace(data, spec=replace(data.spec, network_multiplier=0.5))
    batch = TrainImages([data], None, 7).load(MicroBatch(0, (Sample(0, 0),)), 0, 1, CLOCK)
    assert batch.images_BCHW is not None
    assert batch.latents_BCHW is None
    assert (batch.images_BCHW.shape, batch.images_BCHW.dtype) == ((1, 3, 32, 64), torch.float32)
    assert batch.images_BCHW.min() >= -1
    assert batch.images_BCHW.max() <= 1
    assert batch.images_BCHW[0, 0, :, 0].mean() < -0.9 < 0.9 < batch.images_BCHW[0, 0, :, -1].mean()  # red grows with x
    assert batch.images_BCHW[0, 1, 0].mean() < batch.images_BCHW[0, 1, -1].mean()  # green with y
    assert batch.loss_weights_B.tolist() == [1.0]
    assert batch.original_sizes_hw_B2.tolist() == [[64, 80]]
    assert batch.crop_top_lefts_B2.tolist() == [[9, 0]]  # resized to 64x51, (51 - 32) // 2
    assert batch.target_sizes_hw_B2.tolist() == [[32, 64]]
    assert {one.dtype for one in (batch.original_sizes_hw_B2, batch.crop_top_lefts_B2, batch.target_sizes_hw_B2)} == {
        torch.int64
    }
    assert (batch.keys, batch.flipped, batch.network_multiplier) == (("k",), (False,), 0.5)
    assert batch.captions == ("a, one, two, three",)


@pytest.mark.parametrize("workers", [0, 4])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    data = many_images(tmp_path)
    plain = [TrainImages([data], None, 3).load(micro, 0, 1, CLOCK) for micro in micros(data)]
    random.seed(1)  # the global generator has no part in it
    images = TrainImages([data], None, 3)
    loaded = list(prefetch(micros(data), lambda micro: images.load(micro, 0, 1, CLOCK), workers))
    assert [samples_of(one) for one in loaded] == [samples_of(one) for one in plain]


def test_processes_and_batch_sizes_change_no_sample(tmp_path: Path) -> None:
    data = many_images(tmp_path)
    images = TrainImages([data], None, 3)
    one_by_one = replace(data, spec=replace(data.spec, batch_size=1))
    alone: dict[int, object] = {}
    for micro in micros(one_by_one):
        alone |= samples_of(images.load(micro, 0, 1, CLOCK))
    shared: dict[int, object] = {}
    for micro in micros(data, processes=2):
        for rank in range(2):
            batch = images.load(micro, rank, 2, CLOCK)
            shared |= samples_of(batch) if batch.loss_weights_B.all() else {}
    assert shared == alone
    assert len(alone) == 14


def test_epochs_and_repeats_are_different_visits(tmp_path: Path) -> None:
    data = many_images(tmp_path, count=1)
    images = TrainImages([data], None, 3)
    batches = [
        images.load(MicroBatch(0, (Sample(0, repeat),)), 0, 1, CaptionClock(epoch, 0, 10))
        for epoch in range(1, 13)
        for repeat in range(2)
    ]
    assert len({batch.seeds for batch in batches}) == 24
    assert len({batch.captions for batch in batches}) > 4
    assert {batch.flipped for batch in batches} == {(True,), (False,)}
    assert TrainImages([data], None, 4).load(MicroBatch(0, (Sample(0, 0),)), 0, 1, CLOCK).seeds != batches[0].seeds


def test_weights_of_regularisation_and_of_a_process_left_over(tmp_path: Path) -> None:
    data = many_images(tmp_path, reg_from=5, prior_loss_weight=0.25)
    images = TrainImages([data], None, 3)
    for micro in micros(data):
        batch = images.load(micro, 0, 1, CLOCK)
        expected = [0.25 if data.records[sample.record].is_reg else 1.0 for sample in micro.samples]
        assert batch.loss_weights_B.tolist() == expected
    idle = images.load(MicroBatch(0, (Sample(0, 0),)), 1, 2, CLOCK)
    assert idle.loss_weights_B.tolist() == [0.0]
    assert len(idle.keys) == 1


@pytest.mark.parametrize("to_disk", [True, False])
def test_cached_latents_are_those_of_the_pixels_that_would_be_shown(tmp_path: Path, to_disk: bool) -> None:
    data = many_images(tmp_path, augmentation=Augmentation(flip_aug=True))
    store = LatentStore("sd", "v", to_disk=to_disk)
    vae = AveragingVae()
    (data,), _ = cache_latents([data], vae, store, vae_batch_size=2, device=torch.device("cpu"), dtype=torch.float32)
    cached, plain = TrainImages([data], store, 3), TrainImages([data], None, 3)
    assert (cached.gives_latents(0), plain.gives_latents(0)) == (True, False)
    assert (cached.in_memory(0), plain.in_memory(0)) == (not to_disk, False)
    flips: set[bool] = set()
    for micro in micros(data):
        left, right = cached.load(micro, 0, 1, CLOCK), plain.load(micro, 0, 1, CLOCK)
        assert left.images_BCHW is None
        assert left.latents_BCHW is not None
        assert torch.allclose(left.latents_BCHW, vae.encode(right.images_BCHW).latent_dist.mean, atol=1e-5)
        for name in ("keys", "seeds", "captions", "flipped"):
            assert getattr(left, name) == getattr(right, name)
        for name in ("original_sizes_hw_B2", "crop_top_lefts_B2", "target_sizes_hw_B2", "loss_weights_B"):
            assert torch.equal(getattr(left, name), getattr(right, name))
        flips |= set(left.flipped)
    assert flips == {True, False}


def test_a_batch_never_mixes_latents_and_pixels(tmp_path: Path) -> None:
    first = many_images(tmp_path / "a", augmentation=Augmentation())
    second = many_images(tmp_path / "b", augmentation=Augmentation())
    store = LatentStore("sd", "v")
    cache_latents([first], AveragingVae(), store, vae_batch_size=2, device=torch.device("cpu"), dtype=torch.float32)
    half = replace(first, records=(*first.records, *second.records), fits=(*first.fits, *second.fits))
    images = TrainImages([first, second, half], store, 3)
    assert [images.gives_latents(index) for index in range(3)] == [True, False, False]


def test_one_bad_image_stops_by_name_or_is_replaced_at_weight_zero(tmp_path: Path) -> None:
    data = many_images(tmp_path)
    bad = Path(data.records[1].path)
    bad.write_bytes(bad.read_bytes()[:100])
    strict = TrainImages([data], None, 3)
    with pytest.raises(UserError, match=r"1\.png.*--on_bad_image skip"):
        list(prefetch(micros(data), lambda micro: strict.load(micro, 0, 1, CLOCK), 2))
    images = TrainImages([data], None, 3, on_bad_image="skip")
    replaced = 0
    for micro in micros(data):
        batch = images.load(micro, 0, 1, CLOCK)
        assert len(batch.keys) == len(micro.samples)
        for index, sample in enumerate(micro.samples):
            assert batch.loss_weights_B[index] == (0.0 if sample.record == 1 else 1.0)
            assert batch.keys[index] != str(bad)
        replaced += sum(sample.record == 1 for sample in micro.samples)
    assert replaced == 2
    assert set(images.bad_images) == {str(bad)}


def test_a_batch_of_bad_images_alone_borrows_one_of_its_bucket_and_says_if_there_is_none(tmp_path: Path) -> None:
    data = many_images(tmp_path)
    for index in (1, 2):
        Path(data.records[index].path).write_bytes(b"")
    images = TrainImages([data], None, 3, on_bad_image="skip")
    batch = images.load(MicroBatch(0, (Sample(1, 0), Sample(2, 0))), 0, 1, CLOCK)
    assert batch.loss_weights_B.tolist() == [0.0, 0.0]
    assert set(batch.keys) == {data.records[4].key}
    for one in data.records:
        Path(one.path).unlink()
    with pytest.raises(UserError, match="64x32"):
        images.load(MicroBatch(0, (Sample(1, 0),)), 0, 1, CLOCK)


def test_an_image_whose_size_changed_meanwhile_is_not_stretched(tmp_path: Path) -> None:
    data = many_images(tmp_path, count=1)
    Image.fromarray(picture((64, 64))).save(data.records[0].path)
    with pytest.raises(UserError, match="size changed"):
        TrainImages([data], None, 3).load(MicroBatch(0, (Sample(0, 0),)), 0, 1, CLOCK)


def test_debug_sheets_show_each_bucket_and_end(tmp_path: Path) -> None:
    data = many_images(tmp_path / "images", count=6, augmentation=Augmentation(flip_aug=True))
    data = replace(data, records=(replace(data.records[0], caption="猫, one, two"), *data.records[1:]))
    folder = tmp_path / "out" / "debug_dataset"
    written = write_debug_sheets(TrainImages([data], None, 3), plan_epoch([data], 3, 1, 1, 1), folder, CLOCK, 1)
    assert [path.name for path in written] == ["dataset1_32x64_batch1.png", "dataset1_64x32_batch1.png", "captions.txt"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in written)
    sheet = np.asarray(Image.open(written[1]))
    micro = next(one for one in micros(data) if data.fits[one.samples[0].record].bucket == (64, 32))
    shown = TrainImages([data], None, 3).load(micro, 0, 1, CLOCK).images_BCHW
    assert shown is not None
    expected = ((shown[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(sheet[8:40, 8:72], expected)
    text = written[-1].read_text(encoding="utf-8")
    assert text.count("caption:") == 4
    assert "crop at 0,9" in text
    assert Path(data.records[micro.samples[0].record].path).name in text
