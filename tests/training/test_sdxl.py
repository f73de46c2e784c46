"""Short whole runs of sdxl_train_network.py on the toy model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from library.models.memory import keep_less_for_backward
from library.training import prepare
from tests.toy import write_toy_folder
from tests.training.runs import SDXL_SCRIPT as SCRIPT
from tests.training.runs import metadata, tensors, train, write_photos

BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of different shapes: each has sizes and a crop of its own."""
    return write_photos(tmp_path_factory.mktemp("pictures"), [(64, 64), (130, 70), (70, 130), (200, 190)])


def test_trains_all_three_parts(model_sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    assert train(model_sdxl, pictures, tmp_path, *BUCKETS, script=SCRIPT) == 0
    learnt = tensors(tmp_path / "toy.safetensors")
    for prefix in ("lora_te1_text_model_", "lora_te2_text_model_", "lora_unet_input_blocks_"):
        changed = [float(t.abs().max()) for key, t in learnt.items() if key.startswith(prefix) and "lora_up" in key]
        assert max(changed) > 0, prefix
    said = metadata(tmp_path / "toy.safetensors")
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"


def test_file_and_folder_train_the_same_on_cached_latents(model_sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    folder = write_toy_folder(tmp_path / "model", "sdxl")
    assert train(model_sdxl, pictures, tmp_path / "a", *BUCKETS, "--cache_latents", script=SCRIPT) == 0
    assert train(folder, pictures, tmp_path / "b", *BUCKETS, "--cache_latents", script=SCRIPT) == 0
    first, second = tensors(tmp_path / "a" / "toy.safetensors"), tensors(tmp_path / "b" / "toy.safetensors")
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_previews_and_long_captions(model_sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (sks:1.2) thing --s 2 --d 1\n")
    more = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--max_train_steps", "2")
    more += ("--max_token_length", "225", "--gradient_checkpointing", "--network_train_unet_only")
    assert train(model_sdxl, pictures, tmp_path / "out", *BUCKETS, *more, script=SCRIPT) == 0
    (picture,) = (tmp_path / "out" / "sample").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    assert not any(key.startswith("lora_te") for key in tensors(tmp_path / "out" / "toy.safetensors"))


def test_other_models_and_plans(
    model_sdxl: Path, model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, pictures, tmp_path, script=SCRIPT) == 1
    assert "is a Stable Diffusion 1.x model" in capsys.readouterr().err
    assert train(model_sdxl, pictures, tmp_path) == 1
    assert "is an SDXL model" in capsys.readouterr().err
    assert train(model_sdxl, pictures, tmp_path, "--dry_run", script=SCRIPT) == 0
    assert "optimizer steps" in capsys.readouterr().out


def test_zero_snr_model_asks_for_its_option(
    model_sdxl: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(model_sdxl), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    more = ("--v_parameterization", "--max_train_steps", "1", "--network_train_unet_only")
    for option, told in (((), True), (("--zero_terminal_snr",), False)):
        caplog.clear()
        assert train(tmp_path / "v.safetensors", pictures, tmp_path / "o", *more, *option, script=SCRIPT) == 0
        assert any("zero terminal SNR" in record.message for record in caplog.records) == told


def test_frozen_layers_are_told_to_keep_little(
    model_sdxl: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The U-Net that the network gets keeps no input of frozen convolutions, and learns the same numbers."""
    assert train(model_sdxl, pictures, tmp_path / "a", "--network_train_unet_only", script=SCRIPT) == 0
    changed: list[int] = []
    monkeypatch.setattr(prepare, "keep_less_for_backward", lambda unet: changed.append(keep_less_for_backward(unet)))
    assert train(model_sdxl, pictures, tmp_path / "b", "--network_train_unet_only", script=SCRIPT) == 0
    assert changed[0] > 30
    monkeypatch.setattr(prepare, "keep_less_for_backward", lambda unet: 0)
    assert train(model_sdxl, pictures, tmp_path / "c", "--network_train_unet_only", script=SCRIPT) == 0
    first, *others = (tensors(tmp_path / name / "toy.safetensors") for name in "abc")
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
