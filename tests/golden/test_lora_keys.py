"""Names, shapes, counts and blocks of full-size SD1.5 and SD2.1 networks against the frozen lists of existing files."""

from __future__ import annotations

import csv
import functools
import gzip
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from networks import lora
from networks.block_weights import block_of, side_factors
from networks.network import AdapterNetwork
from networks.weights import to_weight_table
from tests.networks_fixtures import TextEncoderView, full_models

KEYS = Path(__file__).parent / "data" / "keys"
models = functools.cache(full_models)


def rows(name: str) -> list[dict[str, str]]:
    path = KEYS / name
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def listed(name: str) -> dict[str, tuple[int, ...]]:
    return {
        row["key"]: () if row["shape"] == "scalar" else tuple(int(side) for side in row["shape"].split("x"))
        for row in rows(f"{name}.tsv.gz")
    }


def network(sd2: bool, conv: bool, view: bool = False) -> AdapterNetwork:
    encoder, unet = models(sd2)
    text: nn.Module = TextEncoderView(encoder) if view else encoder
    made = lora.create_network(1.0, 4, 1.0, None, text, unet, **({"conv_dim": "4"} if conv else {}))
    made.apply_to(text, unet)
    return made


@pytest.mark.parametrize(
    ("name", "sd2", "conv", "modules", "parameters"),
    [
        ("lora_sd15_lierla", False, False, (72, 192), 2_359_296),
        ("lora_sd15_c3lier", False, True, (72, 278), 4_866_816),
        ("lora_sd21_linear_lierla", True, False, (138, 192), 3_424_256),
        ("lora_sd21_linear_c3lier", True, True, (138, 278), 5_931_776),
    ],
)
@pytest.mark.parametrize("view", [False, True])
def test_keys_shapes_and_counts(
    name: str, sd2: bool, conv: bool, modules: tuple[int, int], parameters: int, view: bool
) -> None:
    made = network(sd2, conv, view)
    try:
        state = made.state_dict()
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == listed(name)
        assert (made.count("text_encoder"), made.count("unet")) == modules
        assert sum(p.numel() for p in made.parameters()) == parameters
        parts = [key.startswith("lora_te_") for key in state]
        assert parts == sorted(parts, reverse=True)  # text encoder first
        units = [key.partition(".")[2] for key in list(state)[:3]]
        assert units == ["alpha", "lora_down.weight", "lora_up.weight"]
    finally:
        made.detach()


def test_sd2_file_with_4d_projections_is_read() -> None:
    """A base from a single file gave 4-D projections; here they are linear, the numbers are the same."""
    tensors = {key: torch.randn(shape) for key, shape in listed("lora_sd21_conv_lierla").items()}
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    assert tensors[key].dim() == 4
    encoder, unet = models(True)
    made, weights = lora.create_network_from_weights(1.0, None, None, encoder, unet, weights_sd=tensors)
    made.apply_to(encoder, unet)
    try:
        missing = made.load_state_dict(weights, strict=True)
        assert not missing.missing_keys
        assert torch.equal(made.state_dict()[key], tensors[key][:, :, 0, 0])
    finally:
        made.detach()


def test_block_indices() -> None:
    expected = {row["lora_name"]: int(row["block_index"]) for row in rows("blocks_sd15_lora.tsv")}
    assert {name: block_of(name) for name in expected} == expected
    made = network(False, True)
    made.detach()
    placed = {entry.target.name: entry.target.block for entry in made._placed if entry.target.part == "unet"}
    assert placed == expected  # by path as by name
    lierla = Counter(block_of(row) for row in expected if "_attentions_" in row)
    assert lierla == dict.fromkeys([1, 2, 4, 5, 7, 8, 12, *range(16, 25)], 12)


def test_presets() -> None:
    for row in rows("block_lr_presets.tsv"):
        expected = [float(row[f"w{index}"]) for index in range(12)]
        assert side_factors(row["preset"]) == pytest.approx(expected, abs=1e-8)


def test_names_of_the_table_are_accepted_as_a_file() -> None:
    tensors = {key: torch.zeros(shape) for key, shape in listed("lora_sd15_c3lier").items()}
    table = to_weight_table(tensors, "table")
    assert len(table.modules) == 350
    assert table.flat().keys() == tensors.keys()
