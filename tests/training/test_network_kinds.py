"""Training LoRA-FA, DyLoRA and OFT by command line: what is learned, drawn with, resumed and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from library.generation.networks import attach_networks
from library.training.state import TRAINABLE_FILE
from tests.generation_fixtures import error, make_engine, make_job, options, picture
from tests.training.bench import Bench
from tests.training.runs import SDXL_SCRIPT, metadata, state, stop_after, tensors, train, write_photos

SIZES = [(80, 64), (64, 80), (64, 64), (70, 70)]
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--learning_rate", "1e-2", "--max_train_steps", "4")
STEPS = ("--max_train_steps", "3")
KINDS: dict[str, tuple[str, ...]] = {
    "lora_fa": ("--network_args", "conv_dim=2", "loraplus_lr_ratio=2"),
    "dylora": ("--network_args", "unit=2", "conv_dim=4", "rank_dropout=0.1", "loraplus_unet_lr_ratio=4"),
    "oft": ("--network_args", "enable_all_linear=True", "enable_conv=True", "module_dropout=0.1"),
    "lora": ("--network_args", "loraplus_unet_lr_ratio=4", "loraplus_text_encoder_lr_ratio=2"),
}
NEW = ("lora_fa", "dylora", "oft")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data"), SIZES)


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def given(kind: str) -> tuple[str, ...]:
    return (*BUCKETS, "--network_module", f"networks.{kind}", *KINDS[kind])


def drawn(family: str, **values: object) -> np.ndarray:
    engine = make_engine(family)
    live = attach_networks(engine, options(**values))
    return picture(engine, make_job("a sks thing", multipliers=tuple(network.multiplier for network in live)))


def check_file(file: Path, kind: str, family: str) -> None:
    """It moved, and draws something else: the same beside the layers, folded in and merged, by any module."""
    found = tensors(file)
    name = "oft_blocks" if kind == "oft" else "lora_up.weight"
    moved = [bool(tensor.any()) for key, tensor in found.items() if key.endswith(name)]
    assert sum(moved) > 0.9 * len(moved)
    assert metadata(file)["ss_network_module"] == f"networks.{kind}"
    beside = drawn(family, network_weights=[str(file)])
    assert error(beside, picture(make_engine(family), make_job("a sks thing"))) > 1e-3
    named = drawn(family, network_weights=[str(file)], network_module=[f"networks.{kind}"], network_pre_calc=True)
    merged = drawn(family, network_weights=[str(file)], network_merge=True)
    assert max(error(merged, beside), error(named, beside)) < 1e-3


@pytest.mark.parametrize("kind", NEW)
def test_trains_draws_and_says_what_moved(
    model: Path, data: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, data, tmp_path, *given(kind)) == 0
    check_file(tmp_path / "toy.safetensors", kind, "sd1")
    said = capsys.readouterr()
    measure = "how far outputs are turned" if kind == "oft" else "norm of the weight change"
    assert f"{measure}" in said.out + said.err
    assert "not measured" not in said.out + said.err


@pytest.mark.parametrize("kind", ["dylora", "oft"])
def test_trains_sdxl(model_sdxl: Path, data: Path, tmp_path: Path, kind: str) -> None:
    assert train(model_sdxl, data, tmp_path, *given(kind), script=SDXL_SCRIPT) == 0
    check_file(tmp_path / "toy.safetensors", kind, "sdxl")


@pytest.mark.parametrize("kind", list(KINDS))
def test_resumed_is_unbroken(
    model: Path, data: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(model, data, whole, *given(kind), *STEPS) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert train(model, data, broken, *given(kind), *STEPS) == 0
    folder = broken / "toy-step00000001-state"
    assert state(folder)["step"] == 1
    kept = {name.partition(".")[2] for name in tensors(folder / TRAINABLE_FILE)}
    assert kept == {name.partition(".")[2] for name in tensors(whole / "toy.safetensors")}  # a fixed down too
    assert train(model, data, broken, *given(kind), *STEPS, "--resume", str(folder)) == 0
    assert (whole / "toy.safetensors").read_bytes() == (broken / "toy.safetensors").read_bytes()


def test_fixed_down_is_saved_and_continued_as_drawn(model: Path, data: Path, tmp_path: Path) -> None:
    assert train(model, data, tmp_path / "a", *given("lora_fa"), *STEPS) == 0
    file = tmp_path / "a" / "toy.safetensors"
    more = ("--network_weights", str(file), "--dim_from_weights", "--seed", "8", "--max_train_steps", "1")
    assert train(model, data, tmp_path / "b", *given("lora_fa"), *more) == 0
    first, second = tensors(file), tensors(tmp_path / "b" / "toy.safetensors")
    assert first.keys() == second.keys()
    for key in first:
        if key.endswith("lora_down.weight"):
            assert first[key].any()
            assert torch.equal(first[key], second[key])
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_refusals(bench: Bench) -> None:
    oft = ("--network_module", "networks.oft")
    (line,) = bench.refusal(*oft, "--scale_weight_norms", "1", late=True)
    assert "--scale_weight_norms" in line
    assert "networks.oft" in line
    (line,) = bench.refusal(*oft, "--network_dim", "7", late=True)
    assert "4 or 8" in line
    (line,) = bench.refusal(*oft, "--network_train_text_encoder_only", late=True)
    assert "no layer to train" in line
    dylora = ("--network_module", "networks.dylora", "--network_dim", "6", "--network_args", "unit=4")
    (line,) = bench.refusal(*dylora, late=True)
    assert "4 or 8" in line
    prodigy = ("--optimizer_type", "Prodigy", "--learning_rate", "1", "--network_args", "loraplus_lr_ratio=4")
    (line,) = bench.refusal(*prodigy, late=True)
    assert "loraplus_*" in line
