"""A run that is interrupted and resumed gives the bytes of an unbroken one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.training.runs import metadata, state, stop_after, tensors, train, write_photos

SIZES = [(80, 64), (64, 80), (64, 64), (70, 70), (96, 64), (64, 64), (90, 70)]
OPTIONS = (
    "--max_train_steps", "12", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "8",
    "--train_batch_size", "2", "--shuffle_caption", "--caption_tag_dropout_rate", "0.3", "--flip_aug",
    "--network_dropout", "0.1", "--noise_offset", "0.05", "--lr_scheduler", "cosine", "--lr_warmup_steps", "3",
    "--gradient_accumulation_steps", "2", "--network_args", "rank_dropout=0.1", "module_dropout=0.1", "conv_dim=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data"), SIZES)


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def test_three_interruptions_change_no_byte(model, data, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(model, data, whole, *OPTIONS) == 0
    resume: tuple[str, ...] = ()
    for steps in (2, 5, 9):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert train(model, data, broken, *OPTIONS, *resume) == 0
        folder = broken / f"toy-step{steps:08d}-state"
        assert state(folder)["step"] == steps
        assert not (broken / "toy.safetensors").exists()
        resume = ("--resume", str(folder))
    assert train(model, data, broken, *OPTIONS, *resume) == 0
    assert (whole / "toy.safetensors").read_bytes() == (broken / "toy.safetensors").read_bytes()


def test_a_finished_run_is_not_run_again(model, data, tmp_path):
    options = ("--max_train_steps", "3", "--save_state_on_train_end")
    assert train(model, data, tmp_path, *options) == 0
    first = tensors(tmp_path / "toy.safetensors")
    assert train(model, data, tmp_path, *options, "--resume", str(tmp_path / "toy-state")) == 0
    again = tensors(tmp_path / "toy.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert metadata(tmp_path / "toy.safetensors")["ss_steps"] == "3"


def test_a_run_made_longer_leaves_all_files_of_the_long_one_and_keeps_its_own(model, data, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    options = ("--save_every_n_epochs", "1", "--save_state_on_train_end")
    assert train(model, data, long, "--max_train_epochs", "2", *options) == 0
    assert train(model, data, short, "--max_train_epochs", "1", *options) == 0
    ended = (short / "toy.safetensors").read_bytes()
    state_folder = str(short / "toy-state")
    assert train(model, data, short, "--max_train_epochs", "2", *options, "--resume", state_folder) == 0
    for name in ("toy-000001.safetensors", "toy.safetensors"):
        a, b = tensors(long / name), tensors(short / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (short / "toy.old1.safetensors").read_bytes() == ended


def test_a_stop_at_the_end_of_an_epoch_counts_it(model, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, len(SIZES))
        assert train(model, data, tmp_path, "--max_train_epochs", "2") == 0
    assert metadata(tmp_path / f"toy-step{len(SIZES):08d}.safetensors")["ss_epoch"] == "1"


def test_another_learning_rate_is_refused_with_its_name(model, data, tmp_path, capsys):
    assert train(model, data, tmp_path, "--save_state", "--save_every_n_steps", "2") == 0
    folder = str(tmp_path / "toy-step00000002-state")
    assert train(model, data, tmp_path, "--resume", folder, "--learning_rate", "5e-4") == 1
    said = capsys.readouterr().err
    assert "learning_rate" in said
    assert "0.001" in said
    assert "0.0005" in said
    assert train(model, data, tmp_path, "--resume", folder, "--learning_rate", "5e-4", "--allow_mismatch") == 0


def test_cadence_and_paths_may_differ(model, data, tmp_path):
    assert train(model, data, tmp_path / "a", "--save_state", "--save_every_n_steps", "2") == 0
    folder = str(tmp_path / "a" / "toy-step00000002-state")
    assert train(model, data, tmp_path / "b", "--resume", folder, "--save_every_n_steps", "1") == 0
    a, b = tensors(tmp_path / "a" / "toy.safetensors"), tensors(tmp_path / "b" / "toy.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_changed_captions_are_noticed(model, data, tmp_path, capsys):
    own = write_photos(tmp_path / "data", SIZES)
    assert train(model, own, tmp_path / "out", "--save_state_on_train_end") == 0
    (own / "1_sks thing" / "photo3.caption").write_text("something else")
    assert train(model, own, tmp_path / "out", "--resume", str(tmp_path / "out" / "toy-state")) == 1
    assert "captions" in capsys.readouterr().err


# ---- what a dry run says of --resume


@pytest.fixture(scope="module")
def stopped(model, data, tmp_path_factory) -> str:
    """A state after two of four steps, of a run with a VAE of its own."""
    out = tmp_path_factory.mktemp("stopped")
    assert train(model, data, out, "--save_state", "--save_every_n_steps", "2", "--vae", str(model)) == 0
    return str(out / "toy-step00000002-state")


def test_a_dry_run_of_the_same_run_says_where_it_goes_on(model, data, stopped, tmp_path, capsys):
    assert train(model, data, tmp_path, "--resume", stopped, "--vae", str(model), "--dry_run") == 0
    assert "goes on after step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--learning_rate", "5e-4"), "learning_rate: 0.001 in the state, 0.0005 now"),
        (("--seed", "8"), "seed: 7 in the state, 8 now"),
        (("--train_batch_size", "2"), "train_batch_size: 1 in the state, 2 now"),
    ],
)
def test_a_dry_run_refuses_what_resume_refuses(model, data, stopped, tmp_path, capsys, more, word):
    assert train(model, data, tmp_path, "--resume", stopped, "--vae", str(model), *more) == 1
    refused = capsys.readouterr().err.partition("error: ")[2]
    assert word in refused
    assert train(model, data, tmp_path, "--resume", stopped, "--vae", str(model), *more, "--dry_run") == 1
    found = capsys.readouterr().err.partition("error: ")[2]
    assert set(refused.splitlines()) <= set(found.splitlines())  # the run ends before it looks at the data
    mismatch = ("--allow_mismatch", "--dry_run")
    assert train(model, data, tmp_path, "--resume", stopped, "--vae", str(model), *more, *mismatch) == 0
    assert word in capsys.readouterr().err


def test_a_dry_run_notices_other_files_and_captions(model, data, stopped, tmp_path, capsys):
    own = write_photos(tmp_path / "data", SIZES)
    (own / "1_sks thing" / "photo3.caption").write_text("something else")
    vae = tmp_path / "other.safetensors"
    changed = {
        key: value + 1 if key == "first_stage_model.encoder.conv_in.bias" else value
        for key, value in tensors(model).items()
    }
    save_file(changed, vae)
    assert train(model, own, tmp_path, "--resume", stopped, "--vae", str(vae), "--dry_run") == 1
    said = capsys.readouterr().err
    assert "data: data set 1 captions" in said
    assert "model: VAE" in said
    assert "model: base model" not in said


def test_a_dry_run_refuses_a_broken_state(model, data, stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "s")
    (tmp_path / "s" / "training.json").unlink()
    assert train(model, data, tmp_path, "--resume", str(tmp_path / "s"), "--dry_run") == 1
    assert "training.json is missing" in capsys.readouterr().err
