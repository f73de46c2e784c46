"""Hashes and modelspec entries of saved files: what a reader computes from the final bytes."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch

from library.checkpoint import hashes
from library.checkpoint.hashes import data_sha256, file_hashes, network_hashes
from library.checkpoint.io import read_header, save_safetensors
from library.checkpoint.modelspec import Modelspec, current_time


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_TRAINER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("elements", [10, 300_000, 600_000])  # below, within and beyond the window at 1 MiB
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_network_hashes_fit_the_final_bytes(tmp_path: Path, elements: int, dtype: torch.dtype | None) -> None:
    tensors = {"lora.down.weight": torch.randn(elements), "lora.alpha": torch.tensor(1.0), "z": torch.randn(elements)}
    metadata = network_hashes(tensors, {"ss_network_dim": "4", "modelspec.title": "Käse"}, dtype)
    path = tmp_path / "lora.safetensors"
    save_safetensors(path, tensors, metadata, dtype)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    written = read_header(path)[1]
    assert written == metadata
    assert written["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert written["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert file_hashes(path).legacy == written["sshs_legacy_hash"]
    assert data_sha256(path) == written["sshs_model_hash"]


def test_legacy_hash_of_a_small_file_is_that_of_nothing() -> None:
    assert network_hashes({"a": torch.zeros(2)}, {})["sshs_legacy_hash"] == "e3b0c442"


def test_file_hashes(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    path.write_bytes(bytes(range(256)) * 8192)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_hashes(path).sha256 == expected
    assert file_hashes(path).legacy == hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert file_hashes(tmp_path).sha256 == "IsADirectory"
    assert file_hashes(tmp_path / "none").legacy == "NOFILE"


def test_full_hash_is_remembered_and_forgotten_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(b"one")
    first = file_hashes(path).sha256
    calls: list[Path] = []
    real = hashes.sha256_of_file

    def counted(file: Path) -> str:
        calls.append(file)
        return real(file)

    monkeypatch.setattr(hashes, "sha256_of_file", counted)
    assert file_hashes(path).sha256 == first
    assert calls == []
    for content, second in ((b"other", 5), (b"again", 6)):  # of another length, and only of another time
        path.write_bytes(content)
        os.utime(path, ns=(second * 10**9, second * 10**9))
        assert file_hashes(path).sha256 == hashlib.sha256(content).hexdigest()
    assert calls == [path, path]


def test_damaged_memory_costs_time_only(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(b"one")
    store = hashes.cache_folder() / "file_hashes.json"
    for content in ("{broken", "[]", f'{{"{path}": [3]}}', f'{{"{path}": "x"}}'):
        store.parent.mkdir(exist_ok=True)
        store.write_text(content)
        assert file_hashes(path).sha256 == hashlib.sha256(b"one").hexdigest()


# ---- modelspec


def test_modelspec_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    spec = Modelspec(
        architecture="stable-diffusion-v1",
        kind="lora",
        implementation="diffusers",
        resolution=(512, 768),
        v_prediction=False,
        timesteps=(None, 500),
        clip_skip=2,
    )
    assert spec.as_metadata() == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "LoRA@1700000000.0",
        "modelspec.resolution": "512x768",
        "modelspec.date": "2023-11-14T22:13:20",
        "modelspec.prediction_type": "epsilon",
        "modelspec.timestep_range": "0,500",
        "modelspec.encoder_layer": "2",
    }


def test_modelspec_leaves_out_what_is_not_known() -> None:
    entries = Modelspec(architecture="x", resolution=(1, 1), title="t", v_prediction=True).as_metadata(now=0)
    assert entries["modelspec.prediction_type"] == "v"
    assert entries["modelspec.title"] == "t"
    assert not {"modelspec.author", "modelspec.timestep_range", "modelspec.encoder_layer"} & entries.keys()


def test_current_time_is_the_clock_unless_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert current_time() > 1.7e9
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12")
    assert current_time() == 12.0
