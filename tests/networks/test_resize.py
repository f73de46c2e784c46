"""Resizing: the weight change and its strength stay, whatever the type, the layer and the number type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.checkpoint.io import open_model_file, read_header
from networks import lora
from networks.adapter import AdapterSize
from networks.editing.precision import is_spatial
from networks.editing.resize import ResizePlan, resize_module
from networks.kinds import adapter_of, adapter_types, kind_of, read_network
from networks.resize_lora import main
from networks.weights import write_weights
from tests.networks_fixtures import randomise, toy_models

LAYERS = {
    "linear": lambda: nn.Linear(24, 20),
    "1x1": lambda: nn.Conv2d(24, 20, 1),
    "3x3": lambda: nn.Conv2d(24, 20, 3, padding=1),
}
TYPES = {kind.__name__: kind for kind in adapter_types()}
NAME = "lora_unet_mid_block_x"


def state_of(kind: str, layer: str, alpha: float = 2.0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    adapter = TYPES[kind](NAME, LAYERS[layer]().requires_grad_(False), AdapterSize(4, alpha))
    adapter.start()
    randomise(adapter)
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def delta(tensors: Mapping[str, Tensor]) -> Tensor:
    return adapter_of(NAME, tensors).delta_weight().flatten(1).double()


@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("alpha", [2.0, -3.0])
def test_full_rank_keeps_the_change_and_half_of_it_is_the_best(kind: str, layer: str, alpha: float) -> None:
    state = state_of(kind, layer, alpha)
    found = kind_of(state)
    assert found is not None
    if found.needs_weight or found.layer_shape(state) is None:
        assert resize_module(NAME, state, found, ResizePlan(8, 8)) is None
        return
    before = delta(state)
    whole = resize_module(NAME, state, found, ResizePlan(99, 99))
    assert whole is not None
    assert float((delta(whole.tensors) - before).norm() / before.norm()) < 2e-6
    assert whole.kept.rank <= torch.linalg.matrix_rank(before, rtol=1e-6)
    assert is_spatial(whole.tensors["lora_down.weight"].shape) == (layer == "3x3")
    half = resize_module(NAME, state, found, ResizePlan(2, 2))
    assert half is not None
    assert half.tensors["lora_down.weight"].shape[0] == 2
    lost = torch.linalg.svdvals(before)[2:].norm()
    torch.testing.assert_close((delta(half.tensors) - before).norm(), lost, rtol=1e-4, atol=1e-6)
    share = float(torch.linalg.svdvals(before)[:2].norm() / before.norm())
    assert half.kept.frobenius_share == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alpha_over_rank_stays(alpha: float) -> None:
    state = state_of("LoraAdapter", "linear", alpha)
    done = resize_module(NAME, state, lora.LoraAdapter, ResizePlan(3, 3))
    assert done is not None
    assert done.alpha / 3 == pytest.approx(alpha / 4)


def test_rounding_alpha_to_fp16_does_not_change_the_strength() -> None:
    state = state_of("LoraAdapter", "linear", 1.0009)  # not a number of bfloat16
    exact = resize_module(NAME, state, lora.LoraAdapter, ResizePlan(3, 3))
    rounded = resize_module(NAME, state, lora.LoraAdapter, ResizePlan(3, 3, dtype=torch.bfloat16))
    assert exact is not None
    assert rounded is not None
    assert rounded.alpha != exact.alpha
    strength = float((delta(rounded.tensors) * delta(exact.tensors)).sum() / delta(exact.tensors).norm() ** 2)
    assert strength == pytest.approx(1.0, abs=6e-4)  # the factors' own rounding; alpha's would be 0.002
    small = resize_module(NAME, state_of("LoraAdapter", "linear", 1e-9), lora.LoraAdapter, ResizePlan(3, 3))
    halved = resize_module(
        NAME, state_of("LoraAdapter", "linear", 1e-9), lora.LoraAdapter, ResizePlan(3, 3, dtype=torch.float16)
    )
    assert small is not None
    assert halved is not None
    assert halved.alpha == 3  # an alpha of 0 would stand for the rank
    assert (delta(halved.tensors) - delta(small.tensors)).norm() < 0.1 * delta(small.tensors).norm()


@pytest.fixture
def network_file(tmp_path: Path) -> Path:
    encoder, unet = toy_models()
    network = lora.create_network(1.0, 6, 3.0, None, encoder, unet, conv_dim="4", conv_alpha="1")
    network.apply_to(encoder, unet)
    randomise(network)
    path = tmp_path / "net.safetensors"
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "6",
        "ss_network_alpha": "3.0",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "1", "dropout": null, "block_dims": "1,2"}',
        "ss_training_comment": "mine",
        "ss_v2": "False",
    }
    write_weights(path, network.state_dict(), None, metadata)
    return path


def test_command(network_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "small.safetensors"
    words = ["--model", str(network_file), "--save_to", str(target), "--new_rank", "2", "--new_conv_rank", "3"]
    assert main([*words, "--save_precision", "fp16", "--verbose"]) == 0
    out = capsys.readouterr()
    rows = [line for line in out.out.splitlines() if " | sum(S) retained: " in line]
    table, _ = read_network(target)
    assert len(rows) == len(table.modules) == 289
    assert all(row[75:].startswith(" | sum(S)") for row in rows if row[:75].rstrip() == row.split()[0])
    assert "Average Frobenius norm retention:" in out.out
    assert "289 layers (rank 2 x" in out.err
    for name, tensors in table.modules.items():
        down = tensors["lora_down.weight"]
        is_spatial = down.dim() == 4 and down.shape[2] == 3
        assert down.shape[0] == (3 if is_spatial else 2), name  # a 1x1 convolution is linear
        assert float(tensors["alpha"]) == pytest.approx(0.75 if is_spatial else 1.0)
        assert down.dtype == torch.float16
    metadata = read_header(target)[1]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_v2"]) == ("2", "1.0", "False")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "0.75", "dropout": None}
    assert metadata["ss_training_comment"] == "dimension is resized from Dynamic to 2 (conv: 3); mine"
    encoder, unet = toy_models()
    network, _ = lora.create_network_from_weights(1.0, str(target), None, encoder, unet)
    network.apply_to(encoder, unet)
    assert network.load_weights(str(target)).loaded == 289


def test_dynamic_ranks(network_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "dynamic.safetensors"
    words = ["--model", str(network_file), "--save_to", str(target), "--new_rank", "5"]
    assert main([*words, "--dynamic_method", "sv_fro", "--dynamic_param", "0.7", "--verbose"]) == 0
    assert ", dynamic | dim: " in capsys.readouterr().out
    table, _ = read_network(target)
    before, _ = read_network(network_file)
    ranks = {tensors["lora_down.weight"].shape[0] for tensors in table.modules.values()}
    assert len(ranks) > 1
    assert max(ranks) <= 5
    for name, tensors in table.modules.items():
        own = before.modules[name]
        share = float(delta(tensors).norm() / delta(own).norm())
        values = torch.linalg.svdvals(delta(own))
        rank = tensors["lora_down.weight"].shape[0]
        assert share >= 0.7 - 1e-6 or rank == 5
        assert rank == 1 or float(values[: rank - 1].norm() / values.norm()) < 0.7  # not one more than needed
    metadata = read_header(target)[1]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert metadata["ss_training_comment"] == "Dynamic resize with sv_fro: 0.7 from Dynamic; mine"


def test_a_parameter_without_its_method_is_told(
    network_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--model", str(network_file), "--save_to", str(tmp_path / "x.pt"), "--dynamic_param", "0.9"]
    assert main(words) == 0
    assert "--dynamic_param does nothing without --dynamic_method" in caplog.text


def test_larger_rank_than_there_is_adds_nothing(network_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "large.pt"
    assert main(["--model", str(network_file), "--save_to", str(target), "--new_rank", "64"]) == 0
    table, _ = read_network(target)
    before, _ = read_network(network_file)
    for name, own in before.modules.items():
        tensors = table.modules[name]
        assert tensors["lora_down.weight"].shape == own["lora_down.weight"].shape
        assert tensors["lora_up.weight"].shape == own["lora_up.weight"].shape
        assert float((delta(tensors) - delta(own)).norm() / delta(own).norm()) < 1e-6
    with open_model_file(target) as file:
        assert file.metadata == {}  # a pickle has no place for it


def test_mistakes_come_before_work(network_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(network_file), "--save_to", str(tmp_path / "x.zip")]
    assert main([*words, "--dynamic_method", "sv_fro"]) == 1
    error = capsys.readouterr().err
    assert "x.zip: the name must end in" in error
    assert "--dynamic_method sv_fro needs --dynamic_param" in error
    (tmp_path / "folder.pt").mkdir()
    good = ["--model", str(network_file), "--save_to", str(tmp_path / "x.pt"), "--dynamic_param"]
    for more, text in (
        (["1.5", "--dynamic_method", "sv_cumulative"], "takes a share"),
        (["0.5", "--dynamic_method", "sv_ratio"], "takes a ratio"),
        (["2", "--device", "nonsense"], "--device nonsense"),
        (["2", "--save_to", str(tmp_path / "folder.pt")], "folder.pt is a folder"),
        (["0"], "above 0"),
    ):
        assert main([*good, *more]) == 1
        assert text in capsys.readouterr().err
    tensors = read_network(network_file)[0].flat()
    first = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[first][0] = float("inf")
    write_weights(tmp_path / "broken.safetensors", tensors, None, {})
    assert main(["--model", str(tmp_path / "broken.safetensors"), "--save_to", str(tmp_path / "x.pt")]) == 1
    assert f"1 tensors hold NaN or infinite values, first {first}" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()
