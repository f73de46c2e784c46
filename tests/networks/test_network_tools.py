"""Splitting a DyLoRA and looking into network files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoint.io import open_model_file, read_header
from networks import check_lora_weights, extract_lora_from_dylora
from networks.editing.split import ranks_of_cuts
from networks.kinds import adapter_of, read_network
from networks.weights import write_weights

LAYERS = ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1")


def modules(rank: int, alpha: float | None = 3.0) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(rank)
    own: dict[str, Tensor] = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    return {
        LAYERS[0]: own | {"lora_down.weight": torch.randn(rank, 8, 1, 1), "lora_up.weight": torch.randn(9, rank, 1, 1)},
        LAYERS[1]: own | {"lora_down.weight": torch.randn(rank, 5), "lora_up.weight": torch.randn(7, rank)},
    }


def write(path: Path, content: dict[str, dict[str, Tensor]], metadata: dict[str, str] | None = None) -> Path:
    flat = {f"{module}.{name}": tensor for module, own in content.items() for name, tensor in own.items()}
    write_weights(path, flat, None, metadata or {})
    return path


def test_cuts() -> None:
    assert ranks_of_cuts(8, 2) == [2, 4, 6, 8]
    assert ranks_of_cuts(8, 8) == [8]
    assert ranks_of_cuts(7, 3) == [3, 6, 7]


@pytest.mark.parametrize("alpha", [3.0, None])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_prefix_has_the_strength_that_it_had(tmp_path: Path, alpha: float | None, suffix: str) -> None:
    whole = modules(6, alpha)
    metadata = {"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "2"}', "ss_training_comment": "x"}
    model = write(tmp_path / f"dylora.{suffix}", whole, metadata)
    words = ["--unit", "2", "--model", str(model), "--save_to", str(tmp_path / f"cut.{suffix}")]
    assert extract_lora_from_dylora.main(words) == 0
    assert sorted(path.name for path in tmp_path.glob("cut*")) == [f"cut-000{rank}.{suffix}" for rank in (2, 4, 6)]
    for rank in (2, 4, 6):
        path = tmp_path / f"cut-000{rank}.{suffix}"
        table, _ = read_network(path)
        for name, own in whole.items():
            assert table.modules[name]["lora_down.weight"].shape[0] == rank
            old = adapter_of(name, own)
            up, down = own["lora_up.weight"].flatten(1)[:, :rank], own["lora_down.weight"].flatten(1)[:rank]
            expected = (up @ down) * old.scale
            torch.testing.assert_close(adapter_of(name, table.modules[name]).delta_weight().flatten(1), expected)
        if suffix == "safetensors":
            said = read_header(path)[1]
            assert said["ss_training_comment"] == f"split from DyLoRA, rank 6 to {rank}; x"
            assert (said["ss_network_module"], said["ss_network_args"]) == ("networks.lora", "{}")
            assert said["ss_network_dim"] == str(rank)
            assert float(said["ss_network_alpha"]) == pytest.approx((alpha or 6) * rank / 6)


def test_split_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "net.safetensors", modules(4))
    words = ["--model", str(model), "--save_to", str(tmp_path / "x.safetensors")]
    assert extract_lora_from_dylora.main([*words, "--unit", "5"]) == 1
    assert "has rank 4" in capsys.readouterr().err
    assert extract_lora_from_dylora.main(words) == 1
    assert "--unit is missing" in capsys.readouterr().err
    tucker = {LAYERS[0]: {**modules(4)[LAYERS[0]], "lora_mid.weight": torch.randn(4, 4, 3, 3)}}
    words[1] = str(write(tmp_path / "tucker.safetensors", tucker))  # a cut that lost the core would be another network
    assert extract_lora_from_dylora.main([*words, "--unit", "2"]) == 1
    assert "only a DyLoRA can be cut" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_check_prints_tensors_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "net.safetensors", modules(4))
    assert check_lora_weights.main([str(model)]) == 0
    out = capsys.readouterr()
    first, *rows = out.out.splitlines()
    assert first == "number of LoRA-up and LoRA-down tensors: 4"
    with open_model_file(model) as file:
        for row in rows:
            key, shape, mean, least = row.split(",")
            tensor = file.tensor(key)
            assert shape == f"({'-'.join(str(side) for side in tensor.shape)})"
            assert float(mean) == pytest.approx(float(tensor.abs().mean()))
            assert float(least) == pytest.approx(float(tensor.abs().min()))
    assert "2 layers (rank 4 x 2), all values finite" in out.err
    assert check_lora_weights.main(["-s", str(model)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "number of tensors: 6"
    assert len(rows) == len({row.split(",")[0] for row in rows}) == 7  # each once


def test_check_says_what_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = modules(2)
    content[LAYERS[1]]["lora_up.weight"][0, 0] = float("inf")
    assert check_lora_weights.main([str(write(tmp_path / "net.safetensors", content)), "--show_all_keys"]) == 1
    assert "NaN or infinite" in capsys.readouterr().err
    assert check_lora_weights.main([]) == 1
    assert "file is missing" in capsys.readouterr().err
