"""Validation and the average of the weights in runs of networks: measured, recorded, and without a trace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from library.options import ValidationOptions
from library.training import loop
from library.training.held_out import hold_out
from tests.data_fixtures import cover_fit, dataset, record, write_picture
from tests.training.runs import metadata, state, tensors, train, write_photos

LINE = re.compile(r"step (\d+): loss/validation ([\d.]+)(.*)")


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos in one subset, two in another."""
    folder = tmp_path_factory.mktemp("folders")
    write_photos(folder / "a", [(64, 64)] * 6)
    write_photos(folder / "b", [(64, 64)] * 2, seed=3)
    for name, place in (("1_cat", "a"), ("2_dog", "b")):
        (folder / place / "1_sks thing").rename(folder / name)
        (folder / place).rmdir()
    return folder


def measured(caplog: pytest.LogCaptureFixture) -> list[tuple[int, float, str]]:
    found = [LINE.fullmatch(record.message) for record in caplog.records]
    return [(int(match[1]), float(match[2]), match[3]) for match in found if match]


def same(one: Path, other: Path) -> bool:
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_measuring_leaves_no_trace(
    model: Path, two_folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout in the network, shuffled captions, noise: all draws stay as they are, and held-out images stay out."""
    pytest.importorskip("tensorboard")
    used: set[str] = set()
    losses: list[float] = []
    original = loop.train_step

    def train_step(*arguments):
        report = original(*arguments)
        used.update(report.keys)
        losses.append(report.loss)
        return report

    monkeypatch.setattr(loop, "train_step", train_step)
    more = ("--validation_split", "0.35", "--network_dropout", "0.3", "--shuffle_caption", "--flip_aug")
    more += ("--max_train_steps", "10", "--network_args", "rank_dropout=0.2", "module_dropout=0.2")
    seldom = ("--validate_every_n_steps", "100")
    assert train(model, two_folders, tmp_path / "seldom", *more, *seldom) == 0
    quiet, losses[:] = list(losses), []
    assert [step for step, _, _ in measured(caplog)] == [0, 10]
    ends = measured(caplog)
    caplog.clear()
    logs = ("--logging_dir", str(tmp_path / "logs"))
    assert train(model, two_folders, tmp_path / "often", *more, "--validate_every_n_steps", "3", *logs) == 0
    assert losses == quiet
    assert same(tmp_path / "seldom" / "toy.safetensors", tmp_path / "often" / "toy.safetensors")
    found = measured(caplog)
    assert [step for step, _, _ in found] == [0, 3, 6, 9, 10]
    assert (found[0], found[-1]) == (ends[0], ends[-1])  # the same noise at the same timesteps
    assert "1_cat" in found[0][2]
    assert "2_dog" in found[0][2]
    assert len(used) == 8 - 2 - 1
    assert any("lowest" in record.message for record in caplog.records)
    assert metadata(tmp_path / "often" / "toy.safetensors")["ss_validation_split"] == "0.35"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = (tmp_path / "logs").rglob("events*tfevents*")
    events = [EventAccumulator(str(folder)).Reload() for folder in {file.parent for file in files}]
    (scalars,) = (one for one in events if "loss/validation" in one.Tags()["scalars"])
    assert [event.step for event in scalars.Scalars("loss/validation/2_dog")] == [0, 3, 6, 9, 10]


def test_loss_does_not_depend_on_the_seed_of_the_run_and_a_resumed_run_remembers(
    model: Path, two_folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("--validation_split", "0.35", "--max_train_steps", "5", "--save_every_n_steps", "2", "--save_state")
    assert train(model, two_folders, tmp_path / "a", *more, "--validate_every_n_steps", "2") == 0
    whole = measured(caplog)
    folder = tmp_path / "a" / "toy-step00000002-state"
    assert [step for step, _ in state(folder)["validation"]] == [0, 2]
    caplog.clear()
    assert (
        train(model, two_folders, tmp_path / "b", *more, "--validate_every_n_steps", "2", "--resume", str(folder)) == 0
    )
    assert measured(caplog) == whole[2:]
    (line,) = [record.message for record in caplog.records if record.message.startswith("validation loss")]
    assert line.startswith(f"validation loss {whole[0][1]:.4f} at step 0, {whole[-1][1]:.4f} at step 5")
    caplog.clear()
    assert train(model, two_folders, tmp_path / "c", *more, "--seed", "8", "--max_train_steps", "1") == 0
    assert measured(caplog)[0] == whole[0]


def test_states_of_former_versions_are_read(model: Path, photos: Path, tmp_path: Path) -> None:
    assert train(model, photos, tmp_path / "a", "--save_every_n_steps", "2", "--save_state") == 0
    folder = tmp_path / "a" / "toy-step00000002-state"
    for name, key in (("state.json", "validation"), ("training.json", "average")):
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content, indent=2 if name == "state.json" else None))
    sizes = state(folder)
    sizes["files"]["training.json"] = (folder / "training.json").stat().st_size
    (folder / "state.json").write_text(json.dumps(sizes))
    assert train(model, photos, tmp_path / "b", "--resume", str(folder)) == 0
    assert same(tmp_path / "a" / "toy.safetensors", tmp_path / "b" / "toy.safetensors")


def test_text_caches_of_sdxl_hold_the_held_out_captions(
    model_sdxl: Path, two_folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.training.runs import SDXL_SCRIPT

    more = ("--validation_split", "0.35", "--cache_text_encoder_outputs", "--network_train_unet_only")
    more += ("--cache_text_encoder_outputs_variants", "2", "--shuffle_caption", "--cache_latents")
    assert train(model_sdxl, two_folders, tmp_path, *more, "--max_train_steps", "1", script=SDXL_SCRIPT) == 0
    assert [step for step, _, _ in measured(caplog)] == [0, 1]


def test_only_some_batches_are_measured_always_the_same(
    model: Path, two_folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three images are held out, one a batch: three batches are all, one or two are a part without the rest's words."""
    more = ("--validation_split", "0.35", "--max_train_steps", "2", "--learning_rate", "1e-30")
    found: dict[str, list[tuple[int, float, str]]] = {}
    for limit in ("1", "2", "3", "9"):
        caplog.clear()
        assert train(model, two_folders, tmp_path / limit, *more, "--max_validation_steps", limit) == 0
        found[limit] = measured(caplog)
    assert {len({loss for _, loss, _ in found[limit]}) for limit in found} == {1}  # nothing learns: the same images
    assert len({found[limit][0][1] for limit in ("1", "2", "3")}) == 3
    assert found["3"] == found["9"]
    assert found["1"][0][2] == ""  # an image is of one subset
    assert "2_dog" in found["3"][0][2]


@pytest.fixture
def held_out(tmp_path: Path) -> list[Path]:
    """Photos of which two are held out by 0.3: these, each of a size of its own."""
    names = [f"photo{index}.png" for index in range(7)]
    write_photos(tmp_path / "photos", [(64, 64)] * len(names))
    folder = tmp_path / "photos" / "1_sks thing"
    records = [record(folder / name, (64, 64)) for name in names]
    _, (part,) = hold_out(
        [dataset(records, [cover_fit((64, 64), (64, 64))] * len(names))], ValidationOptions(validation_split=0.3)
    )
    paths = [Path(one.path) for one in part.records]
    for path, size in zip(paths, ((128, 32), (32, 128)), strict=True):
        write_picture(path, size)
    return paths


def damage(path: Path) -> None:
    """What only decoding shows: the file's ends are whole."""
    content = path.read_bytes()
    assert len(content) > 200
    path.write_bytes(content[:100] + content[-50:])


BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32")
SPLIT = ("--validation_split", "0.3", "--max_train_steps", "2", "--validate_every_n_steps", "1", *BUCKETS)


@pytest.mark.parametrize("cached", [(), ("--cache_latents",)], ids=["pixels", "latents"])
def test_a_held_out_bucket_without_readable_images_is_left_out(
    model: Path, held_out: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, cached: tuple[str, ...]
) -> None:
    data = tmp_path / "photos"
    kept, damaged = held_out
    damage(damaged)
    if not cached:
        assert train(model, data, tmp_path / "stop", *SPLIT) == 1
    assert train(model, data, tmp_path / "first", *SPLIT, "--on_bad_image", "skip", *cached) == 0
    found = measured(caplog)
    assert [step for step, _, _ in found] == [0, 1, 2]
    assert sum(str(damaged) in one.message for one in caplog.records) == 1
    damage(kept)
    caplog.clear()
    assert train(model, data, tmp_path / "second", *SPLIT, "--on_bad_image", "skip", *cached) == 0
    assert not [one for one in caplog.records if "loss/validation" in one.message]
    assert sum("no held-out image can be used" in one.message for one in caplog.records) == 1
    assert same(tmp_path / "first" / "toy.safetensors", tmp_path / "second" / "toy.safetensors")


def test_the_plan_and_refusals(
    model: Path, two_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, two_folders, tmp_path, "--validation_split", "0.35", "--dry_run", "--ema_decay", "0.9") == 0
    said = capsys.readouterr().out
    assert "3 images held out" in said
    assert "the average of the weights" in said
    assert train(model, two_folders, tmp_path, "--validation_split", "0.01") == 1
    assert "holds out no image" in capsys.readouterr().err
    assert train(model, two_folders, tmp_path, "--validation_split", "0.35", "--max_validation_steps", "0") == 1
    assert "--max_validation_steps 0" in capsys.readouterr().err
    assert train(model, two_folders, tmp_path, "--ema_decay", "1") == 1
    assert "--ema_decay 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("every", "says"),
    [
        (("--sample_every_n_epochs", "2"), "after epochs: 2; after steps: none; at the end"),
        (("--sample_every_n_steps", "2"), "after epochs: none; after steps: 2; at the end"),
    ],
)
def test_the_plan_names_the_last_preview_once(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], every: tuple[str, ...], says: str
) -> None:
    (prompts := tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    length = ("--max_train_epochs", "4") if "--sample_every_n_epochs" in every else ("--max_train_steps", "4")
    assert train(model, photos, tmp_path, "--sample_prompts", str(prompts), *every, *length, "--dry_run") == 0
    assert f"previews {says}" in capsys.readouterr().out


def test_the_average_of_a_network_follows_its_formula(model: Path, photos: Path, tmp_path: Path) -> None:
    more = ("--ema_decay", "0.9", "--ema_device", "cpu", "--save_every_n_steps", "1", "--save_last_n_steps", "2")
    assert train(model, photos, tmp_path, *more) == 0
    written = {path.name for path in tmp_path.glob("*.safetensors")}
    assert written == {f"toy-step0000000{n}{end}.safetensors" for n in (2, 3, 4) for end in ("", "-ema")} | {
        "toy.safetensors",
        "toy-ema.safetensors",
    }
    fourth, third_ema, fourth_ema = (
        tensors(tmp_path / f"toy-step0000000{name}.safetensors") for name in ("4", "3-ema", "4-ema")
    )
    kept = 5 / 14  # the fourth update: (1 + 4) / (10 + 4)
    for key, before in third_ema.items():
        torch.testing.assert_close(fourth_ema[key], kept * before + (1 - kept) * fourth[key], rtol=1e-5, atol=1e-7)
    assert not same(tmp_path / "toy.safetensors", tmp_path / "toy-ema.safetensors")
    assert metadata(tmp_path / "toy-ema.safetensors")["ss_sdt_is_average"] == "True"
    assert "ss_sdt_is_average" not in metadata(tmp_path / "toy.safetensors")


def test_every_second_epoch(model: Path, two_folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Measured at the start, after every second epoch and at the end; what the user says of the file is in it."""
    more = ("--validation_split", "0.35", "--max_train_epochs", "3", "--validate_every_n_epochs", "2")
    said = {"title": "my cat", "description": "a cat", "license": "CC0", "tags": "cat, photo"}
    words = [word for name, text in said.items() for word in (f"--metadata_{name}", text)]
    assert train(model, two_folders, tmp_path, *more, "--training_comment", "first try", *words) == 0
    steps = [step for step, _, _ in measured(caplog)]
    kept = metadata(tmp_path / "toy.safetensors")
    per_epoch = int(kept["ss_num_batches_per_epoch"])
    assert steps == [0, 2 * per_epoch, 3 * per_epoch]
    assert kept["ss_training_comment"] == "first try"
    assert {name: kept[f"modelspec.{name}"] for name in said} == said
