"""Latents made ahead, in memory and on disk: which files are believed, which names are taken, what is made again."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from library.data import cache
from library.data.cache import LatentStore
from library.data.cache_files import BrokenArchive, read_array, read_facts, write_archive
from library.data.images import UnreadableImage
from library.data.records import Augmentation, Fit, ResolvedDataset
from library.log import UserError
from library.training.caching import bind_prepared_latents, leave_out_lone_latents
from tests.cache_fixtures import CPU, archives, disk_store, latents_of, one_image, run
from tests.data_fixtures import AveragingVae, cover_fit, dataset, record, write_picture

MIRRORED = Augmentation(flip_aug=True)


def make_newer(path: Path, seconds: float) -> None:
    moment = time.time_ns() + int(seconds * 1e9)
    os.utime(path, ns=(moment, moment))


# ---- what is written


def test_the_file_has_the_references_members_and_ours(tmp_path: Path) -> None:
    data = one_image(tmp_path, augmentation=Augmentation(flip_aug=True))
    run([data], disk_store())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"latents", "latents_flipped", "original_size", "crop_ltrb", "fingerprint"}
        assert (archive["latents"].dtype, archive["latents"].shape) == (np.float32, (4, 8, 8))
        assert (archive["latents_flipped"].dtype, archive["latents_flipped"].shape) == (np.float32, (4, 8, 8))
        assert archive["original_size"].tolist() == [80, 64]
        assert archive["original_size"].dtype == np.array((1, 2)).dtype
        assert (archive["crop_ltrb"].dtype, archive["crop_ltrb"].shape) == (np.float64, (4,))
        fingerprint = json.loads(str(archive["fingerprint"]))
    assert fingerprint["vae"] == "vae-1"
    assert fingerprint["image_bytes"] == (tmp_path / "a.png").stat().st_size
    assert str(tmp_path) not in json.dumps(fingerprint)


def test_mirrored_latents_are_those_of_the_mirrored_picture(tmp_path: Path) -> None:
    data = one_image(tmp_path, size=(64, 64), augmentation=Augmentation(flip_aug=True))
    store = LatentStore("sd", "v")
    run([data], store)
    assert torch.allclose(latents_of(data, store, flipped=True), latents_of(data, store).flip(-1), atol=1e-6)
    assert not torch.equal(latents_of(data, store, flipped=True), latents_of(data, store))


def test_disk_and_memory_hold_the_same_latents(tmp_path: Path) -> None:
    data = one_image(tmp_path)
    disk, memory = disk_store(), LatentStore("sd", "vae-1")
    run([data], disk, AveragingVae(deviation=0.5))
    run([data], memory, AveragingVae(deviation=0.5))
    assert torch.equal(latents_of(data, disk), latents_of(data, memory))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_holds_one_compact_array_per_image(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = [write_picture(tmp_path / f"{index}.png", (64, 64), index) for index in range(4)]
    data = dataset([record(path, (64, 64)) for path in paths], [cover_fit((64, 64), (64, 64))] * 4)
    store = LatentStore("sd", "v", memory_dtype=dtype)
    run([data], store, vae_batch_size=4)
    for index in range(4):
        latents = latents_of(data, store, index=index)
        assert latents.dtype == dtype
        assert latents.untyped_storage().nbytes() == 4 * 8 * 8 * dtype.itemsize  # no view that keeps the whole group
    assert archives(tmp_path) == []


# ---- posterior


def test_the_draw_depends_on_the_image_and_not_on_its_group(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{index}.png", (64, 64)) for index in range(5)]  # five equal pictures
    data = dataset([record(path, (64, 64)) for path in paths], [cover_fit((64, 64), (64, 64))] * 5)
    results = []
    for batch_size in (1, 3, 5):
        store = LatentStore("sd", "v")
        run([data], store, AveragingVae(deviation=1.0), vae_batch_size=batch_size)
        results.append(torch.stack([latents_of(data, store, index=index) for index in range(5)]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0][0], results[0][1])
    mean = nn.functional.avg_pool2d(results[0], 8)
    assert mean.abs().max() < 3  # noise of deviation 1 around the picture, not a sum of several draws


# ---- which archives are believed


def test_a_second_run_makes_nothing(tmp_path: Path) -> None:
    data = one_image(tmp_path)
    run([data], disk_store())
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    vae = AveragingVae()
    _, report = run([data], disk_store(), vae)
    assert (report.reused, report.encoded, vae.calls) == (1, 0, [])
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before


def test_an_edited_image_of_the_same_size_is_encoded_again(tmp_path: Path) -> None:
    data = one_image(tmp_path)
    first = disk_store()
    run([data], first)
    old = latents_of(data, first)
    write_picture(tmp_path / "a.png", (80, 64), seed=9)
    make_newer(tmp_path / "a.png", -3600)  # even if its time lies before the archive's
    second = disk_store()
    _, report = run([data], second)
    assert report.encoded == 1
    assert archives(tmp_path) == ["a.npz"]  # replaced, not piled up
    assert not torch.equal(latents_of(data, second), old)


def test_an_image_edited_without_a_change_of_its_length_is_encoded_again(tmp_path: Path) -> None:
    data = one_image(tmp_path)
    run([data], disk_store())
    make_newer(tmp_path / "a.png", -3600)
    assert run([data], disk_store())[1].encoded == 1
    assert archives(tmp_path) == ["a.npz"]


def test_archives_of_other_pixels_or_with_another_list_of_facts_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = one_image(tmp_path)
    run([data], disk_store())
    with np.load(tmp_path / "a.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != "fingerprint"}
        facts = json.loads(str(archive["fingerprint"]))
    for wrong in ({**facts, "new": 1}, {name: value for name, value in facts.items() if name != "resize"}):
        write_archive(tmp_path / "a.npz", arrays, wrong)
        assert run([data], disk_store())[1].encoded == 1
        for path in tmp_path.glob("*.npz"):
            path.unlink()
    run([data], disk_store())
    monkeypatch.setattr(cache, "RESIZE_VERSION", cache.RESIZE_VERSION + 1)
    assert run([data], disk_store())[1].encoded == 1


@pytest.mark.parametrize("change", ["vae", "family", "bucket", "resized"])
def test_another_purpose_gets_its_own_file_and_both_stay_valid(tmp_path: Path, change: str) -> None:
    data = one_image(tmp_path)
    run([data], disk_store())
    other, store = data, disk_store()
    if change == "vae":
        store = disk_store(vae="vae-2")
    elif change == "family":
        store = disk_store(family="sdxl")
    elif change == "bucket":
        other = one_image(tmp_path, bucket=(32, 32))
    else:
        other = replace(data, fits=(Fit((64, 64), (81, 64), (0, 0, 64, 64), 0.0),))
    _, report = run([other], store)
    assert report.encoded == 1
    names = archives(tmp_path)
    assert len(names) == 2
    assert names[0] == "a.npz"
    assert names[1].startswith("a_32x32_" if change == "bucket" else "a_64x64_")
    for again, where in ((data, disk_store()), (other, disk_store(*(["vae-2"] if change == "vae" else ["vae-1"])))):
        if change != "family":
            assert run([again], where)[1].encoded == 0
    assert archives(tmp_path) == names


def test_two_data_sets_over_one_folder_in_one_run(tmp_path: Path) -> None:
    small, large = one_image(tmp_path, bucket=(32, 32)), one_image(tmp_path, bucket=(64, 64))
    store = disk_store()
    run([small, large], store)
    assert latents_of(small, store).shape == (4, 4, 4)
    assert latents_of(large, store).shape == (4, 8, 8)
    again = disk_store()
    assert run([large, small], again)[1].encoded == 0


def test_images_of_equal_stem_do_not_share_latents(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jpg", tmp_path / "a.png"
    write_picture(first, (64, 64), 1)
    write_picture(second, (64, 64), 5)
    data = dataset([record(first, (64, 64)), record(second, (64, 64))], [cover_fit((64, 64), (64, 64))] * 2)
    for store in (disk_store(), disk_store()):
        _, report = run([data], store)
        assert not torch.allclose(latents_of(data, store), latents_of(data, store, index=1), atol=1e-3)
        assert len(archives(tmp_path)) == 2
    assert report.encoded == 0


def test_flip_asked_for_later_extends_the_file_and_still_serves_without(tmp_path: Path) -> None:
    plain, flipping = one_image(tmp_path), one_image(tmp_path, augmentation=Augmentation(flip_aug=True))
    run([plain], disk_store())
    assert run([flipping], disk_store())[1].encoded == 1
    assert archives(tmp_path) == ["a.npz"]
    assert run([plain], disk_store())[1].encoded == 0
    assert run([flipping], disk_store())[1].encoded == 0


def test_mixed_flip_settings_are_each_images_own(tmp_path: Path) -> None:
    # the reference uses the flag of the last image for all
    paths = [write_picture(tmp_path / f"{index}.png", (64, 64), index) for index in range(3)]
    records = [record(path, (64, 64), subset=index % 2) for index, path in enumerate(paths)]
    data = dataset(records, [cover_fit((64, 64), (64, 64))] * 3, subsets=2)
    subsets = (replace(data.spec.subsets[0], augmentation=Augmentation(flip_aug=True)), data.spec.subsets[1])
    data = replace(data, spec=replace(data.spec, subsets=subsets))
    vae = AveragingVae()
    run([data], disk_store(), vae, vae_batch_size=3)
    assert [shape[0] for shape, _ in vae.calls] == [3, 2]
    flipped = ["latents_flipped" in read_facts(tmp_path / f"{index}.npz").names for index in range(3)]  # type: ignore[union-attr]
    assert flipped == [True, False, True]


def write_foreign(data: ResolvedDataset, path: Path, gain: float = 1.05, **changed: np.ndarray) -> None:
    """Another program's archive of the first image: what the VAE gives times ``gain``, so that it can be told."""
    store = LatentStore("sd", "v")
    mirrored = replace(data, spec=replace(data.spec, subsets=(replace(data.spec.subsets[0], augmentation=MIRRORED),)))
    run([mirrored], store)
    arrays = {
        "latents": latents_of(data, store).numpy() * np.float32(gain),
        "latents_flipped": latents_of(data, store, flipped=True).numpy() * np.float32(gain),
        "original_size": np.array(data.records[0].size),
        "crop_ltrb": np.zeros(4, np.float64),
    }
    np.savez(path, **(arrays | changed))  # type: ignore[arg-type]


def test_files_of_the_reference_are_used_and_that_is_said(tmp_path: Path) -> None:
    data = one_image(tmp_path)
    write_foreign(data, tmp_path / "a.npz")
    store, vae = disk_store(), AveragingVae()
    _, report = run([data], store, vae)
    assert (report.encoded, len(vae.calls)) == (0, 1)
    assert torch.equal(latents_of(data, store), torch.from_numpy(read_array(tmp_path / "a.npz", "latents")))
    assert "without a fingerprint" in report.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_the_reference_by_another_vae_are_left_alone_and_said(tmp_path: Path, dtype: torch.dtype) -> None:
    """SD latents have the names and shapes of SDXL's: only what they hold tells them apart."""
    data = one_image(tmp_path)
    write_foreign(data, tmp_path / "a.npz", gain=-1.4)
    before = (tmp_path / "a.npz").read_bytes()
    store = disk_store()
    _, report = run([data], store, dtype=dtype)
    assert report.encoded == 1
    assert [("are not used" in note, "a.npz" in note) for note in report.notes] == [(True, True)]
    assert (tmp_path / "a.npz").read_bytes() == before
    assert float(latents_of(data, store).mean()) == pytest.approx(
        -float(np.mean(read_array(tmp_path / "a.npz", "latents"))) / 1.4, abs=0.01
    )
    vae = AveragingVae()
    _, again = run([data], disk_store(), vae, dtype=dtype)
    assert (again.encoded, vae.calls, again.notes) == (0, [], ())


def test_one_file_of_each_folder_of_the_reference_answers_for_all(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{index % 2}" / f"{index}.png", (64, 64), index) for index in range(6)]
    records = [record(path, (64, 64)) for path in paths]
    data = dataset(records, [cover_fit((64, 64), (64, 64))] * 6)
    for index, path in enumerate(paths):
        one = replace(data, records=(records[index],), fits=data.fits[:1])
        write_foreign(one, path.with_suffix(".npz"), gain=-1.4 if index % 2 else 1.0)
    vae = AveragingVae()
    _, report = run([data], disk_store(), vae, vae_batch_size=3)
    assert (report.reused, report.encoded) == (3, 3)
    assert [shape[0] for shape, _ in vae.calls] == [1, 1, 3]


@pytest.mark.parametrize("wrong", ["shape", "older", "size", "missing key", "flip"])
def test_files_of_the_reference_that_do_not_fit_are_not_used(tmp_path: Path, wrong: str) -> None:
    data = one_image(tmp_path, augmentation=Augmentation(flip_aug=wrong == "flip"))
    file = tmp_path / "a.npz"
    changed = {
        "size": {"original_size": np.array((64, 80))},
        "shape": {"latents": np.zeros((4, 8, 9), np.float32)},
        "flip": {"latents_flipped": np.zeros((4, 8, 9), np.float32)},
    }
    write_foreign(data, file, **changed.get(wrong, {}))
    if wrong == "older":
        make_newer(tmp_path / "a.png", 60)
    if wrong == "missing key":
        np.savez(file, latents=np.zeros((4, 8, 8), np.float32))
    before = file.read_bytes()
    store, vae = disk_store(), AveragingVae()
    _, report = run([data], store, vae)
    assert (report.encoded, len(vae.calls)) == (1, 2 if wrong == "flip" else 1)
    is_same_purpose = wrong in ("older", "flip")
    assert (file.read_bytes() != before) == is_same_purpose  # what serves another purpose is left alone
    assert run([data], disk_store())[1].encoded == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "bit"])
def test_broken_archives_are_made_again(tmp_path: Path, damage: str) -> None:
    data = one_image(tmp_path)
    file = tmp_path / "a.npz"
    run([data], disk_store())
    whole = file.read_bytes()
    broken = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no archive"}.get(damage)
    file.write_bytes(broken if broken is not None else whole[:400] + b"\xff" * 64 + whole[464:])
    store = disk_store()
    _, report = run([data], store)
    if damage == "bit":  # the checksum of the latents is only seen when they are read
        with pytest.raises(UnreadableImage, match=r"a\.npz.*damaged"):
            latents_of(data, store)
        _, report = run([data], disk_store())
        assert report.encoded == 1
        return
    assert report.encoded == 1
    assert "unreadable" in report.notes[0]
    assert file.read_bytes()[-22:] == whole[-22:]
    assert archives(tmp_path) == ["a.npz"]


def test_pickles_and_giant_members_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, latents=np.array([{"code": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BrokenArchive):
        read_array(file, "latents")
    np.savez_compressed(file, fingerprint=np.zeros(1 << 20, np.uint8))
    with pytest.raises(BrokenArchive, match="bytes"):
        read_facts(file)


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(UserError, match="space"):
        write_archive(tmp_path / "a.npz", {}, {})
    assert list(tmp_path.iterdir()) == []


# ---- latents prepared ahead by the preparation script (metadata names them)


def bound(data: ResolvedDataset, store: LatentStore | None = None) -> int:
    store = LatentStore("sd", "v") if store is None else store
    return bind_prepared_latents([data], store, AveragingVae(), device=CPU, dtype=torch.float32)


def test_prepared_latents_are_bound(tmp_path: Path) -> None:
    data = one_image(tmp_path)
    prepared = tmp_path / "elsewhere" / "a.npz"
    prepared.parent.mkdir()
    write_foreign(data, prepared)
    data = replace(data, records=(replace(data.records[0], npz_path=str(prepared)),))
    store = LatentStore("sd", "v")
    assert bound(data, store) == 1
    assert torch.equal(latents_of(data, store), torch.from_numpy(read_array(prepared, "latents")))
    (tmp_path / "a.png").unlink()  # latents without their image train too
    assert bound(data) == 1
    for augmentation in (Augmentation(color_aug=True), Augmentation(random_crop=True)):
        changing = replace(
            data, spec=replace(data.spec, subsets=(replace(data.spec.subsets[0], augmentation=augmentation),))
        )
        assert bound(changing) == 0
    data_wrong = replace(data, fits=(cover_fit((80, 64), (32, 32)),))
    assert bound(data_wrong) == 0


def test_prepared_latents_of_another_vae_are_not_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = one_image(tmp_path)
    write_foreign(data, tmp_path / "a.npz", gain=-1.4)
    data = replace(data, records=(replace(data.records[0], npz_path=str(tmp_path / "a.npz")),))
    assert bound(data) == 0
    assert "another VAE" in caplog.text


def test_latents_without_an_image_serve_where_all_others_do(tmp_path: Path) -> None:
    """Where pixels have to be read for another image of the data set, those that have none are told."""
    sizes = [(80, 64)] * 2
    paths = [write_picture(tmp_path / f"{name}.png", size) for name, size in zip("ab", sizes, strict=True)]
    data = dataset([record(path, (80, 64)) for path in paths], [cover_fit(size, (64, 64)) for size in sizes])
    for path, one in zip(paths, data.records, strict=True):
        write_foreign(replace(data, records=(one,), fits=data.fits[:1]), path.with_suffix(".npz"))
    lone = replace(data.records[0], path=str(tmp_path / "a.npz"), npz_path=str(tmp_path / "a.npz"))
    pictured = replace(data.records[1], npz_path=str(tmp_path / "b.npz"))
    data, store = replace(data, records=(lone, pictured)), LatentStore("sd", "v")
    assert bound(data, store) == 2
    assert leave_out_lone_latents([data], store, "error") == (data,)
    (tmp_path / "b.npz").write_bytes(b"")
    store = LatentStore("sd", "v")
    bound(data, store)
    with pytest.raises(UserError, match=r"a.npz.*--cache_latents makes the others"):
        leave_out_lone_latents([data], store, "error")
    assert [one.path for one in leave_out_lone_latents([data], store, "skip")[0].records] == [pictured.path]
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.npz.*no image beside these latents"):
        run([replace(data, records=(lone,), fits=data.fits[:1])], LatentStore("sd", "v"))
