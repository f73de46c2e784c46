"""``--network_args``: typed, checked, all problems at once; ranks, alphas and rates per block."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.log import UserError
from networks import lora
from networks.block_weights import block_factors, block_of, side_factors
from networks.network import AdapterNetwork
from networks.network_args import read_lora_args
from tests.networks_fixtures import toy_models

ENCODER, UNET = toy_models()


def make(dim: int | None = 4, alpha: float | None = 1.0, **args: object) -> AdapterNetwork:
    return lora.create_network(1.0, dim, alpha, None, ENCODER, UNET, **args)


def sizes(network: AdapterNetwork, spatial: bool = False) -> dict[int | None, set[tuple[int, float]]]:
    found: dict[int | None, set[tuple[int, float]]] = {}
    for entry in network._placed:
        if entry.target.is_spatial == spatial:
            found.setdefault(entry.target.block, set()).add((entry.adapter.rank, float(entry.adapter.alpha)))
    return found


def test_all_problems_are_listed_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        read_lora_args({"convdim": "4", "rank_dropout": "1.5", "block_dims": "1,2", "conv_alpha": "x", "algo": "lokr"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "did you mean conv_dim?" in lines[0]
    assert "rank_dropout=1.5: must be 0 or more and less than 1" in lines[1]
    assert "needs 25 values, has 2" in lines[2]
    assert "must be a number" in lines[3]
    assert "algo" in lines[4]


@pytest.mark.parametrize("bad", ["-1", "2.5", "nan", ""])
def test_bad_ranks(bad: str) -> None:
    if bad == "":
        assert read_lora_args({"conv_dim": bad}).conv_dim is None
    else:
        with pytest.raises(UserError, match="conv_dim"):
            read_lora_args({"conv_dim": bad})


def test_dropout_given_as_none_is_not_given() -> None:
    assert read_lora_args({"dropout": None, "rank_dropout": "None"}) == read_lora_args({})


def test_alpha_without_convolutions_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not read_lora_args({"conv_alpha": "1"}).with_convolutions
    assert "conv_alpha" in caplog.text


def test_defaults() -> None:
    assert sizes(make(None, None)) == {block: {(4, 1.0)} for block in (None, 1, 2, 4, 5, 7, 8, 12, *range(16, 25))}
    assert sizes(make(8, 0))[1] == {(8, 8.0)}  # alpha 0 is the rank
    assert sizes(make(conv_dim=2), spatial=True)[3] == {(2, 1.0)}
    assert sizes(make(conv_dim=2, conv_alpha=0), spatial=True)[3] == {(2, 2.0)}
    # layers of the ResNets without a kernel take the linear rank
    assert sizes(make(6, 3, conv_dim=2))[10] == {(6, 3.0)}


def test_block_dims_and_alphas() -> None:
    dims = ",".join(str(index) for index in range(25))
    alphas = ",".join(str(index / 2) for index in range(25))
    network = make(4, 1.0, block_dims=dims, block_alphas=alphas, conv_block_dims="3", conv_block_alphas=alphas)
    linear, spatial = sizes(network), sizes(network, spatial=True)
    assert linear[None] == {(4, 1.0)}  # the text encoder keeps network_dim
    assert all(linear[block] == {(block, block / 2)} for block in linear if block is not None)
    assert all(spatial[block] == {(3, block / 2)} for block in spatial)
    only_some = ",".join("0" if index < 20 else "2" for index in range(25))
    assert set(sizes(make(block_dims=only_some))) == {None, 20, 21, 22, 23, 24}
    # the reference reads conv_block_alphas only with conv_block_dims
    assert sizes(make(conv_dim=2, conv_block_alphas=alphas), spatial=True)[3] == {(2, 1.5)}


def test_block_rates_make_groups_and_leave_zero_blocks_out() -> None:
    network = make(down_lr_weight="zeros", mid_lr_weight="0.5", up_lr_weight="linear+.5")
    network.apply_to(ENCODER, UNET)
    groups = network.prepare_optimizer_params(1e-5, 1e-3, 1e-4)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    network.detach()
    rates = {group["lr_name"]: group["lr"] for group in groups}
    assert next(iter(rates)) == "textencoder"
    expected = {"textencoder": 1e-5, "unet_block12": 5e-4}
    expected |= {f"unet_block{block}": 1e-3 * ((block - 13) / 11 + 0.5) for block in range(16, 25)}
    assert rates == pytest.approx(expected)


def test_threshold_and_default_rate() -> None:
    network = make(up_lr_weight="linear", block_lr_zero_threshold="0.5")
    assert {entry.target.block for entry in network._placed} >= {19, 24}
    assert not {entry.target.block for entry in network._placed} & {13, 14, 15, 16, 17, 18}
    network.apply_to(ENCODER, UNET, apply_text_encoder=False)
    groups = network.prepare_optimizer_params(None, None, 2e-3)
    assert {group["lr_name"]: group["lr"] for group in groups}["unet_block24"] == pytest.approx(2e-3)
    with pytest.raises(UserError, match="learning_rate"):
        network.prepare_optimizer_params(None, None)
    network.detach()


def test_side_factors() -> None:
    assert side_factors("0.5") == (0.5,) * 12  # the reference fails on a single number
    assert side_factors("1,,1,1,1,1,1,1,1,1,1,2") == (1.0, 0.0, *(1.0,) * 9, 2.0)
    sine = [0, 0.1423, 0.2817, 0.4154, 0.5406, 0.6549, 0.7557, 0.8413, 0.9096, 0.9595, 0.9898, 1]
    assert side_factors("sine") == pytest.approx(sine, abs=5e-5)
    assert side_factors("cosine+.25")[0] == 1.25
    assert side_factors("cosine+.25")[-1] == pytest.approx(0.25)
    for bad in ("1,2", "sinus", "1," * 13, "sine+x", "-1", "1,1,1,1,1,1,1,1,1,1,1,-1"):
        with pytest.raises(ValueError, match=r"needs 12|must be|no number"):
            side_factors(bad)


@given(st.lists(st.floats(0, 4), min_size=12, max_size=12), st.floats(0, 4), st.floats(0, 2))
def test_factors_keep_their_places(values: list[float], middle: float, threshold: float) -> None:
    factors = block_factors(tuple(values), middle, None, threshold)
    given_values = [*values, middle, *(1.0,) * 12]
    assert list(factors.values) == [value if value > threshold else 0.0 for value in given_values]
    assert factors.of(None) == 1.0


def test_block_of() -> None:
    expected = {
        "down_blocks.0.attentions.0.proj_in": 1,
        "lora_unet_down_blocks_2_downsamplers_0_conv": 9,
        "lora_unet_mid_block_resnets_0_conv1": 12,
        "up_blocks.0.resnets.0.conv1": 13,
        "lora_unet_up_blocks_2_upsamplers_0_conv": 21,
        "lora_unet_up_blocks_3_attentions_2_proj_in": 24,
        "conv_in": None,
        "time_embedding.linear_1": None,
    }
    assert {path: block_of(path) for path in expected} == expected


def test_network_dropout_reaches_the_adapters() -> None:
    for args, expected in (
        ({"neuron_dropout": 0.1, "dropout": "0.3"}, 0.1),
        ({"dropout": "0.3"}, 0.3),
        ({}, 0.0),
    ):
        assert make(**args).adapters[0].dropouts.neuron == expected
    assert make(rank_dropout="0.2", module_dropout="0.4").adapters[0].dropouts.module == 0.4
