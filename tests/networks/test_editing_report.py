"""What tools say of a file that they wrote."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from library.checkpoint.io import read_header, save_safetensors
from networks.editing.report import check_file, report
from networks.kinds import adapter_of
from networks.weights import write_weights


def pair(out: int, rank: int, inner: int, alpha: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(out)
    return {
        "alpha": torch.tensor(alpha),
        "lora_down.weight": torch.randn(rank, inner),
        "lora_up.weight": torch.randn(out, rank),
    }


def test_report_names_all_that_is_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = {
        "lora_unet_mid_block_attentions_0_proj_in": pair(8, 4, 6, 2.0),
        "lora_unet_up_blocks_1_attentions_0_proj_in": pair(9, 2, 6, 2.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": pair(7, 4, 5, 4.0),
    }
    path = tmp_path / "net.safetensors"
    write_weights(path, {f"{m}.{n}": t for m, tensors in modules.items() for n, t in tensors.items()}, None, {})
    caplog.set_level(logging.INFO, "networks")
    check = report(path)
    assert (check.modules, check.ranks) == (3, {4: 2, 2: 1})
    expected = sum(float(adapter_of(name, own).delta_weight().norm()) ** 2 for name, own in modules.items()) ** 0.5
    assert check.norm == pytest.approx(expected, rel=1e-6)
    assert check.sha256 == check.sha256_said == read_header(path)[1]["sshs_model_hash"]
    for text in ("3 layers (rank 2 x 1, rank 4 x 2), all values finite", "mid_block", "text encoder", check.sha256):
        assert text is not None
        assert text in caplog.text
    assert not check.problems


def test_wrong_hash_and_foreign_names(tmp_path: Path) -> None:
    path = tmp_path / "peft.safetensors"
    base = "unet.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{base}.lora_A.weight": torch.ones(2, 3), f"{base}.lora_B.weight": torch.ones(4, 2)}
    save_safetensors(path, tensors, {"sshs_model_hash": "0" * 64})
    check = check_file(path)
    assert (check.modules, check.ranks, [change.block for change in check.blocks]) == (1, {2: 1}, ["down_blocks_0"])
    assert any("hash" in problem for problem in check.problems)
    save_safetensors(path, tensors, {"sshs_model_hash": "0x" + "0" * 64})  # LyCORIS counts in another way
    assert not any("hash" in problem for problem in check_file(path).problems)
