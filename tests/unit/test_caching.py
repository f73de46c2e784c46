"""Making latents ahead: what is refused or left out, groups, processes, precision, and the tool."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from library.checkpoint.hashes import weights_fingerprint
from library.data.cache import LatentStore, target_of
from library.data.records import ResolvedDataset
from library.log import UserError
from library.training.caching import (
    WorkShare,
)
from tests.cache_fixtures import archives, disk_store, latents_of, one_image, run
from tests.data_fixtures import AveragingVae, cover_fit, dataset, record, write_picture

# ---- what is refused, what is left out


def broken_pair(folder: Path) -> ResolvedDataset:
    good, bad = write_picture(folder / "good.png", (64, 64)), folder / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    changed = write_picture(folder / "changed.png", (64, 70))
    records = [record(path, (64, 64)) for path in (bad, good, changed)]
    return dataset(records, [cover_fit((64, 64), (64, 64))] * 3)


@pytest.mark.parametrize("to_disk", [True, False])
def test_bad_images_are_listed_together_or_left_out(tmp_path: Path, to_disk: bool) -> None:
    data = broken_pair(tmp_path)
    with pytest.raises(UserError) as caught:
        run([data], LatentStore("sd", "v", to_disk=to_disk))
    assert "bad.png" in str(caught.value)
    assert "changed.png" in str(caught.value)
    store = LatentStore("sd", "v", to_disk=to_disk)
    (left,), report = run([data], store, on_bad_image="skip")
    assert [Path(one.path).name for one in left.records] == ["good.png"]
    assert len(left.fits) == 1
    assert [Path(problem.path).name for problem in report.problems] == ["bad.png", "changed.png"]
    assert target_of(left.records[0], left.fits[0]) in store


def test_no_image_left_is_said(tmp_path: Path) -> None:
    data = one_image(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image is left"):
        run([data], disk_store(), on_bad_image="skip")


def test_regularisation_alone_is_no_training(tmp_path: Path) -> None:
    """An epoch has as many of them as of the others: none."""
    for name in ("bad", "reg"):
        write_picture(tmp_path / f"{name}.png", (64, 64))
    (tmp_path / "bad.png").write_bytes(b"")
    records = [record(tmp_path / f"{name}.png", (64, 64), reg=name == "reg") for name in ("bad", "reg")]
    data = dataset(records, [cover_fit((64, 64), (64, 64))] * 2)
    with pytest.raises(UserError, match="no image is left to train on"):
        run([data], LatentStore("sd", "v"), on_bad_image="skip")


@pytest.mark.parametrize("to_disk", [True, False])
def test_not_finite_latents_are_made_again_in_float32(tmp_path: Path, to_disk: bool) -> None:
    paths = [write_picture(tmp_path / f"{index}.png", (64, 64), index) for index in range(4)]
    write_picture(tmp_path / "2.png", (64, 64))
    from PIL import Image

    Image.new("RGB", (64, 64), (250, 250, 250)).save(paths[2])
    data = dataset([record(path, (64, 64)) for path in paths], [cover_fit((64, 64), (64, 64))] * 4)
    store = LatentStore("sd", "v", to_disk=to_disk)
    vae = AveragingVae(overflow_above=0.8)
    _, report = run([data], store, vae, dtype=torch.bfloat16, vae_batch_size=4)
    assert [Path(name).name for name in report.float32_retries] == ["2.png"]
    assert vae.calls == [((4, 3, 64, 64), torch.bfloat16), ((1, 3, 64, 64), torch.float32)]
    assert vae.gain.dtype == torch.bfloat16
    assert report.encoded == 4
    assert all(bool(latents_of(data, store, index=index).isfinite().all()) for index in range(4))


def test_latents_that_stay_not_finite_are_a_problem(tmp_path: Path) -> None:
    class Hopeless(AveragingVae):
        def encode(self, images_BCHW: torch.Tensor) -> object:  # type: ignore[override]
            result = super().encode(images_BCHW)
            result.latent_dist.mean.fill_(float("inf"))
            return result

    with pytest.raises(UserError, match=r"a\.png.*not finite"):
        run([one_image(tmp_path)], disk_store(), Hopeless())
    assert archives(tmp_path) == []


# ---- processes, groups, memory


def test_processes_share_the_work_on_disk(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{index}.png", (64, 64 if index % 3 else 96), index) for index in range(9)]
    sizes = [(64, 64 if index % 3 else 96) for index in range(9)]
    data = dataset(
        [record(path, size) for path, size in zip(paths, sizes, strict=True)], [cover_fit(size, size) for size in sizes]
    )
    (tmp_path / "4.png").write_bytes(b"broken")
    barrier = threading.Barrier(2, timeout=20)
    vaes, stores = [AveragingVae(), AveragingVae()], [disk_store(), disk_store()]
    results: dict[int, object] = {}

    def process(rank: int) -> None:
        share = WorkShare(rank, 2, lambda: barrier.wait() and None)
        results[rank] = run([data], stores[rank], vaes[rank], share=share, on_bad_image="skip")

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (first, first_report), (second, second_report) = results[0], results[1]  # type: ignore[misc]
    assert first == second
    assert len(first[0].records) == 8
    assert first_report.problems == second_report.problems
    assert first_report.encoded + second_report.encoded == 8
    assert min(first_report.encoded, second_report.encoded) >= 3
    for index in range(8):
        assert torch.equal(latents_of(first[0], stores[0], index=index), latents_of(first[0], stores[1], index=index))


def test_groups_hold_one_bucket_and_each_image_once(tmp_path: Path) -> None:
    sizes = [(64, 32), (32, 64)] * 4  # equal areas interleave in the reference
    paths = [write_picture(tmp_path / f"{index}.png", size, index) for index, size in enumerate(sizes)]
    records = [record(path, size) for path, size in zip(paths, sizes, strict=True)]
    data = dataset(records, [cover_fit(size, size) for size in sizes])
    vae = AveragingVae()
    run([data, data], LatentStore("sd", "v"), vae, vae_batch_size=3)
    assert [shape for shape, _ in vae.calls] == [
        (3, 3, 64, 32),
        (1, 3, 64, 32),
        (3, 3, 32, 64),
        (1, 3, 32, 64),
    ]


def test_decoding_runs_a_bounded_way_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import library.training.caching as caching

    paths = [write_picture(tmp_path / f"{index}.png", (32, 32), index) for index in range(30)]
    data = dataset([record(path, (32, 32)) for path in paths], [cover_fit((32, 32), (32, 32))] * 30)
    decoded: list[str] = []
    real = caching.read_image
    monkeypatch.setattr(caching, "read_image", lambda path: decoded.append(path) or real(path))

    class Watching(AveragingVae):
        def encode(self, images_BCHW: torch.Tensor) -> object:  # type: ignore[override]
            time.sleep(0.003)
            assert len(decoded) <= 2 * (len(self.calls) + 1 + 2 * 2)
            return super().encode(images_BCHW)

    run([data], LatentStore("sd", "v"), Watching())
    assert len(decoded) == 30


def test_the_devices_cache_is_emptied_once_for_each_size(tmp_path: Path) -> None:
    sizes = [(64, 32)] * 3 + [(32, 64)] * 2
    paths = [write_picture(tmp_path / f"{index}.png", size, index) for index, size in enumerate(sizes)]
    records = [record(path, size) for path, size in zip(paths, sizes, strict=True)]
    data = dataset(records, [cover_fit(size, size) for size in sizes])
    vae, seen = AveragingVae(), []
    run([data], disk_store(), vae, vae_batch_size=1, after_group=lambda: seen.append(len(vae.calls)))
    assert seen == [2, 5]  # after both portrait images, after all


def test_weights_fingerprint_sees_values_and_names() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    assert weights_fingerprint(one) == weights_fingerprint(one) != weights_fingerprint(two)
    two.load_state_dict(one.state_dict())
    assert weights_fingerprint(one) == weights_fingerprint(two)
    assert weights_fingerprint(nn.Sequential(one)) != weights_fingerprint(one)
    assert len(weights_fingerprint(one.to(torch.bfloat16))) == 16


# ---- the tool


def test_the_tool_takes_training_options_and_reuses_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.options.script import parse
    from library.options.scripts import CACHE_LATENTS
    from library.training.ahead import cache_latents_ahead
    from tests.toy import write_toy_checkpoint
    from tools.cache_latents import main

    images = tmp_path / "2_cat"
    for index in range(3):
        write_picture(images / f"{index}.png", (80, 64), index)
    model = write_toy_checkpoint(tmp_path / "toy.safetensors")
    arguments = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(tmp_path), "--resolution", "64"]
    arguments += ["--skip_existing", "--vae_batch_size", "2", "--flip_aug"]
    settings = parse(CACHE_LATENTS, arguments)
    reports = [cache_latents_ahead(settings) for _ in range(2)]
    assert [(report.reused, report.encoded) for report in reports] == [(0, 3), (3, 0)]
    assert archives(images) == ["0.npz", "1.npz", "2.npz"]
    assert main([*arguments, "--vae_batch_size", "0"]) == 1
    assert "vae_batch_size" in capsys.readouterr().err


def test_archives_serve_types_that_ask_for_no_more_digits(tmp_path: Path) -> None:
    """Made in float32 for all types, in one half precision for the other: the hash of fp16 stands in those of bf16."""
    from library.families.sd import SdFamily
    from library.options import ModelOptions
    from library.options.script import parse
    from library.options.scripts import CACHE_LATENTS
    from library.training.ahead import cache_latents_ahead
    from tests.toy import write_toy_checkpoint

    model = write_toy_checkpoint(tmp_path / "toy.safetensors")
    whole, half = tmp_path / "whole" / "1_cat", tmp_path / "half" / "1_cat"
    for folder in (whole, half):
        write_picture(folder / "a.png", (80, 64))

    def encoded(folder: Path, precision: str) -> int:
        words = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder.parent)]
        words += ["--resolution", "64", "--mixed_precision", precision]
        return cache_latents_ahead(parse(CACHE_LATENTS, words)).encoded

    assert [encoded(whole, precision) for precision in ("no", "bf16", "no")] == [1, 0, 0]
    assert [encoded(half, precision) for precision in ("bf16", "bf16", "no")] == [1, 0, 1]
    vae = SdFamily().load_vae(ModelOptions(pretrained_model_name_or_path=str(model)), dtype=torch.float16)
    for folder in (whole, half):
        with np.load(folder / "a.npz", allow_pickle=False) as archive:
            assert weights_fingerprint(vae) in json.loads(str(archive["fingerprint"]))["vae_in_other_types"]
