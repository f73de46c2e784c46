"""A run that is interrupted and resumed gives the bytes of an unbroken one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
