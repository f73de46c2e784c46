"""Training sizes and latents for a metadata file: the reference's form, no image twice, no bad image ends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from library.checkpoint.hashes import weights_fingerprint
from library.checkpoint.io import save_safetensors
from library.data import cache_files
from library.data.cache import LatentStore
from library.data.dataset import TrainImages
from library.data.records import CaptionClock, DatasetKind, MicroBatch, ResolvedDataset, Sample
from library.data.sources import resolve
from library.data.spec import load_dataset_specs
from library.options import DataOptions
from library.preparation import metadata
from library.training import caching, metadata_latents
from library.training.caching import bind_prepared_latents
from tests.data_fixtures import AveragingVae, write_picture
from tests.toy import toy_modules, write_toy_checkpoint
from tools.prepare_buckets_latents import main

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "cache"
SMALL = ("--min_bucket_reso", "128", "--max_bucket_reso", "512")


class ToyVae(AveragingVae):
    """An averaging VAE with what the tool reads of a VAE's configuration."""

    config = {"scaling_factor": 0.18215}  # noqa: RUF012


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> ToyVae:
    """Stands in for every VAE file."""
    made = ToyVae()
    monkeypatch.setattr(metadata_latents, "load_vae", lambda path, target, option: made)
    return made


def photos(folder: Path, *sizes: tuple[int, int]) -> Path:
    for number, size in enumerate(sizes):
        write_picture(folder / f"{number}.png", size, number)
    return folder


def run(folder: Path, *more: str) -> tuple[int, dict[str, dict[str, object]]]:
    source, target = folder.parent / "in.json", folder.parent / "out.json"
    if not source.exists():
        source.write_text('{"gone": {"caption": "no image"}, "0": {"caption": "first"}}')
    (folder.parent / "model.safetensors").touch()
    model = str(folder.parent / "model.safetensors")
    status = main([str(folder), str(source), str(target), model, "--max_resolution", "256,256", *SMALL, *more])
    return status, json.loads(target.read_text()) if target.exists() else {}


def test_the_references_form_with_a_whole_model(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(GOLDEN / "chelsea.png", folder / "chelsea.png")
    (tmp_path / "in.json").write_text('{"chelsea": {"caption": "a cat"}}')
    write_toy_checkpoint(tmp_path / "model.safetensors")
    assert run(folder, "--flip_aug")[0] == 0
    expected = {"chelsea": {"caption": "a cat", "train_resolution": [320, 192]}}
    assert (tmp_path / "out.json").read_text() == json.dumps(expected, indent=2)
    with np.load(GOLDEN / "chelsea_sd1.npz") as theirs, np.load(folder / "chelsea.npz") as ours:
        assert set(ours.files) == {*theirs.files, "fingerprint"}
        for name in theirs.files:
            assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        for name in ("original_size", "crop_ltrb"):
            assert np.allclose(ours[name], theirs[name])


def resolved(folder: Path) -> tuple[ResolvedDataset, ...]:
    options = DataOptions(in_json=str(folder.parent / "out.json"), train_data_dir=str(folder), flip_aug=True)
    specs = load_dataset_specs(options, frozenset({DatasetKind.FINETUNE}))
    return resolve(specs, allow_captionless=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("more", [(), ("--bucket_no_upscale",)])
def test_training_finds_the_latents_in_every_precision(tmp_path: Path, dtype: torch.dtype, more: tuple[str, ...]):
    """Without upscaling a picture is only cut, where training by the bucket alone would scale it: still the same."""
    folder = photos(tmp_path / "in", (300, 201), (150, 190))
    (tmp_path / "in.json").write_text("{}")
    write_toy_checkpoint(tmp_path / "model.safetensors")
    assert run(folder, "--flip_aug", *more)[0] == 0
    (dataset,) = resolved(folder)
    of_training = toy_modules("sd1")["vae"].to(dtype)

    def bound(vae: str) -> int:
        store = LatentStore("sd", vae)
        return bind_prepared_latents([dataset], store, of_training, device=torch.device("cpu"), dtype=dtype)

    assert bound(weights_fingerprint(of_training)) == 2
    assert bound("of another VAE") == 0
    write_picture(folder / "0.png", (300, 201), seed=5)  # an edited image is noticed
    assert bound(weights_fingerprint(of_training)) < 2


@pytest.mark.parametrize("fingerprint", [True, False], ids=["ours", "the reference's"])
def test_latents_serve_without_their_images(tmp_path: Path, fingerprint: bool):
    """SDXL is told the size of the image that they were made of, not the size of the training."""
    folder = photos(tmp_path / "in", (300, 201), (150, 190))
    (tmp_path / "in.json").write_text("{}")
    write_toy_checkpoint(tmp_path / "model.safetensors")
    assert run(folder, "--flip_aug")[0] == 0
    for name in ("0", "1"):
        (folder / f"{name}.png").unlink()
        if not fingerprint:
            with np.load(folder / f"{name}.npz") as archive:
                members = {member: archive[member] for member in archive.files if member != "fingerprint"}
            np.savez(folder / f"{name}.npz", **members)  # pyright: ignore[reportArgumentType]
    (dataset,) = resolved(folder)
    vae = toy_modules("sd1")["vae"]
    store = LatentStore("sd", weights_fingerprint(vae))
    assert bind_prepared_latents([dataset], store, vae, device=torch.device("cpu"), dtype=torch.float32) == 2
    images = TrainImages([dataset], store, 7)
    sizes = []
    for index in range(2):
        batch = images.load(MicroBatch(0, (Sample(index, 0),)), 0, 1, CaptionClock(1, 0, 1))
        assert batch.latents_BCHW is not None
        sizes += batch.original_sizes_hw_B2.tolist()
    assert sorted(sizes) == [[190, 150], [201, 300]]
    if fingerprint:
        other = LatentStore("sd", "of another VAE")
        assert bind_prepared_latents([dataset], other, vae, device=torch.device("cpu"), dtype=torch.float32) == 0


def test_each_image_is_read_once_however_many_buckets(tmp_path: Path, vae: ToyVae, monkeypatch: pytest.MonkeyPatch):
    sizes = [(64 + 8 * (n % 4), 64 + 8 * (n // 4)) for n in range(12)]
    folder = photos(tmp_path / "in", *sizes)
    counts = {"read": 0, "fit": 0, "facts": 0, "save": 0}

    def counted(name: str, owner: object, attribute: str) -> None:
        original = getattr(owner, attribute)

        def call(*args: object, **named: object) -> object:
            counts[name] += 1
            return original(*args, **named)

        monkeypatch.setattr(owner, attribute, call)

    counted("read", caching, "read_image")
    counted("fit", metadata_latents, "fit")
    counted("facts", cache_files, "read_facts")
    counted("save", metadata, "atomic_write_text")
    status, entries = run(folder, "--bucket_no_upscale", "--bucket_reso_steps", "8", "--batch_size", "2")
    assert status == 0
    buckets = {tuple(entry["train_resolution"]) for entry in entries.values() if "train_resolution" in entry}  # type: ignore[arg-type]
    assert len(buckets) > 9
    assert counts["read"] == counts["fit"] == len(sizes)
    assert counts["facts"] <= 4 * len(sizes)
    assert counts["save"] == 1
    assert len(vae.calls) <= len(sizes)
    assert "train_resolution" not in entries["gone"]


def test_a_second_run_makes_nothing_anew(tmp_path: Path, vae: ToyVae, caplog: pytest.LogCaptureFixture):
    folder = photos(tmp_path / "in", (80, 64), (64, 80))
    assert run(folder)[0] == 0
    made = len(vae.calls)
    write_picture(folder / "1.png", (64, 80), seed=9)
    with caplog.at_level("INFO"):
        assert run(folder, "--skip_existing")[0] == 0
    assert len(vae.calls) == made + 1
    assert "images prepared: 1, left alone: 1" in caplog.text


def test_latents_of_another_purpose_make_way(tmp_path: Path, vae: ToyVae):
    """Training looks for the name without a tag: latents of another size or model must not keep it."""
    folder = photos(tmp_path / "in", (320, 320))
    run(folder)
    run(folder, "--max_resolution", "128", "--sdxl")
    assert [path.name for path in folder.glob("*.npz")] == ["0.npz"]
    assert np.load(folder / "0.npz")["latents"].shape == (4, 16, 16)


def test_bad_images_are_passed_over(tmp_path: Path, vae: ToyVae, caplog: pytest.LogCaptureFixture):
    folder = photos(tmp_path / "in", (80, 64), (80, 64))
    (folder / "empty.png").write_bytes(b"")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:60] + b"\0" * 40 + whole[100:])  # its header is good
    write_picture(folder / "0.jpg", (64, 64))
    status, entries = run(folder)
    assert status == 0
    assert {key for key, entry in entries.items() if "train_resolution" in entry} == {"0"}
    assert all(name in caplog.text for name in ("empty.png", "1.png", "would share its .npz with 0.jpg"))


def test_keys_that_are_paths(tmp_path: Path, vae: ToyVae):
    folder = photos(tmp_path / "in", (80, 64))
    write_picture(folder / "sub" / "0.png", (64, 80))
    assert run(folder, "--recursive")[0] == 1
    status, entries = run(folder, "--recursive", "--full_path")
    assert status == 0
    assert entries[str(folder / "sub" / "0.png")]["train_resolution"] == [256, 256]
    assert (folder / "sub" / "0.npz").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sdxl", "--bucket_reso_steps", "8"), "multiple of 32"),
        (("--mixed_precision", "fp16"), "fp16"),
        (("--max_resolution", "wide"), "max_resolution"),
        (("--max_resolution", "256,520"), "--max_bucket_reso 512: is below --max_resolution 256,520"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(
    tmp_path: Path, vae: ToyVae, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
):
    status, entries = run(photos(tmp_path / "in", (80, 64)), *more)
    assert (status, entries) == (1, {})
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (("a",), "no VAE was found in this file"),
        (("encoder.down_blocks.0.x",), "the tensor encoder.down_blocks.0.resnets.0.conv2.weight is missing"),
        (("first_stage_model.x",), "the tensor first_stage_model.encoder.down.0.block.0.conv2.weight is missing"),
    ],
)
def test_a_file_without_a_vae_is_told_with_its_own_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: tuple[str, ...], problem: str
):
    folder = photos(tmp_path / "in", (64, 64))
    (tmp_path / "in.json").write_text("{}")
    model = tmp_path / "model.safetensors"
    save_safetensors(model, {key: torch.zeros(1) for key in keys})
    assert main([str(folder), str(tmp_path / "in.json"), str(tmp_path / "out.json"), str(model), *SMALL]) == 1
    assert f"error: model_name_or_path {model}: {problem}" in capsys.readouterr().err
