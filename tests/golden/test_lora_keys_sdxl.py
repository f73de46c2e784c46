"""Names, shapes, counts and blocks of a full-size SDXL network against the frozen lists of existing files."""

from __future__ import annotations

import csv
import functools
import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.families.sdxl_view import sdxl_view
from networks import lora
from networks.block_weights import SDXL_BLOCKS, block_of
from networks.targets import unet_targets
from tests.networks_fixtures import TextEncoderView, bare_full_sdxl_models

KEYS = Path(__file__).parent / "data" / "keys"
models = functools.cache(bare_full_sdxl_models)


def rows(name: str) -> list[dict[str, str]]:
    text = gzip.decompress((KEYS / f"{name}.tsv.gz").read_bytes()).decode()
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def listed(name: str) -> dict[str, tuple[int, ...]]:
    return {
        row["key"]: () if row["shape"] == "scalar" else tuple(int(side) for side in row["shape"].split("x"))
        for row in rows(name)
    }


def names_table() -> list[dict[str, str]]:
    return rows("lora_names_sdxl_vs_diffusers")


@functools.cache
def view() -> nn.Module:
    return sdxl_view(models()[1])


@pytest.mark.parametrize(
    ("name", "conv", "modules", "parameters"),
    [("lora_sdxl_lierla", False, 722, 14_252_032), ("lora_sdxl_c3lier", True, 788, 15_909_632)],
)
@pytest.mark.parametrize("viewed", [False, True])
def test_keys_shapes_and_counts(name: str, conv: bool, modules: int, parameters: int, viewed: bool) -> None:
    encoders, whole = models()[0], view()
    text = [TextEncoderView(encoders[0]), encoders[1]] if viewed else encoders
    args: dict[str, Any] = {"conv_dim": "4"} if conv else {}
    made = lora.create_network(1.0, 4, 1.0, None, text, whole, **args)
    made.apply_to(text, whole)
    try:
        state = made.state_dict()
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == listed(name)
        names = [key.partition(".")[0] for key in state if key.endswith(".alpha")]
        kinds = Counter("_".join(module.split("_")[:2]) for module in names)
        assert kinds == {"lora_te1": 72, "lora_te2": 192, "lora_unet": modules}
        assert sum(p.numel() for p in made.parameters()) == parameters
        parts = [module.split("_")[1] for module in names]
        assert parts == sorted(parts)  # te1, te2, unet
    finally:
        made.detach()


def test_both_names_of_every_layer() -> None:
    expected = {row["stability_style_lora_name"]: row for row in names_table()}
    targets = unet_targets(view(), True)
    assert {target.name for target in targets} == set(expected)
    for target in targets:
        row = expected[target.name]
        assert target.layer is models()[1].get_submodule(row["diffusers_module_path"])
        assert target.other_names == (row["diffusers_style_lora_name"],)


def test_names_are_those_of_the_paths_that_are_given() -> None:
    """That a U-Net is told sizes does not make it SDXL: the family says so, by the view."""
    bare, viewed = unet_targets(models()[1], True), unet_targets(view(), True)
    names = {id(target.layer): (target.name, target.block) for target in bare}
    assert names == {id(target.layer): (target.other_names[0], target.block) for target in viewed}


def test_blocks() -> None:
    """19 blocks in the order of a file: input 0-8, middle 9, output 0-8."""
    known = {
        "lora_unet_input_blocks_1_0_in_layers_2": 1,
        "lora_unet_input_blocks_3_0_op": 3,
        "lora_unet_input_blocks_8_1_proj_in": 8,
        "lora_unet_middle_block_2_emb_layers_1": 9,
        "lora_unet_output_blocks_0_1_proj_in": 10,
        "lora_unet_output_blocks_5_2_conv": 15,
        "lora_unet_output_blocks_8_0_skip_connection": 18,
    }
    assert {name: block_of(name, SDXL_BLOCKS) for name in known} == known
    for row in names_table():
        names = row["stability_style_lora_name"], row["diffusers_style_lora_name"], row["diffusers_module_path"]
        assert len({block_of(name, SDXL_BLOCKS) for name in names}) == 1, names
    by_block = Counter(target.block for target in unet_targets(view(), False))
    shallow, deep = 2 * 10 + 2, 10 * 10 + 2
    assert by_block == dict.fromkeys([4, 5, 13, 14, 15], shallow) | dict.fromkeys([7, 8, 9, 10, 11, 12], deep)


def test_the_view_has_the_keys_of_a_file() -> None:
    prefix = "model.diffusion_model."
    keys = [row["checkpoint_key"] for row in rows("map_sdxl") if row["component"] == "unet"]
    assert {prefix + key for key in view().state_dict()} == set(keys)
    assert len(keys) == 1680
    assert [name for name, _ in view().named_children()] == [
        "time_embed",
        "label_emb",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "out",
    ]


def test_files_with_the_names_of_diffusers_are_accepted() -> None:
    encoders, unet = models()[0], view()
    own = {row["stability_style_lora_name"]: row["diffusers_style_lora_name"] for row in names_table()}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in listed("lora_sdxl_c3lier").items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    foreign = {}
    for key, tensor in tensors.items():
        module, dot, rest = key.partition(".")
        foreign[own.get(module, module) + dot + rest] = tensor
    assert foreign.keys() != tensors.keys()
    made, weights = lora.create_network_from_weights(1.0, None, None, encoders, unet, weights_sd=foreign)
    assert weights.keys() == tensors.keys()
    assert made.count("unet") == 788
    assert made.count("text_encoder") == 72 + 192
