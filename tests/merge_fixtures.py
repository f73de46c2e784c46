"""Toy models and networks of any type for the tests of the tools that merge; what is costly is made once a family."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.families.sdxl_view import sdxl_view
from library.models import build
from library.models.stream import open_model
from networks import merge_lora, sdxl_merge_lora
from networks.adapter import Adapter, AdapterSize
from networks.targets import Target, find_targets
from networks.weights import file_tensors, write_weights
from tests.networks_fixtures import randomise
from tests.toy import toy_modules, toy_spec

FAMILIES = ("sd1", "sd2", "sdxl")
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def run_merge(family: str, *argv: object) -> int:
    """The merging tool of the family, by its command line."""
    tool = sdxl_merge_lora if family == "sdxl" else merge_lora
    v2 = ["--v2"] if family == "sd2" else []
    return tool.main([*v2, *(str(word) for word in argv)])


@functools.cache
def plain_modules(family: str) -> dict[str, nn.Module]:
    """The toy's parts; not to be changed."""
    return toy_modules(family, drawn_vectors=True)


def states(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All tensors by part and canonical key."""
    return {
        f"{name}/{key}": tensor for name, part in modules.items() for key, tensor in build.canonical_state(part).items()
    }


def states_of_file(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of a model's files, float32, in the shapes of ``like``."""
    with open_model(path) as model:
        return {
            f"{part}/{key}": value.read().float().reshape(like[f"{part}/{key}"].shape)
            for part, tensors in model.parts.items()
            for key, value in tensors.items()
        }


@functools.cache
def layers_of(family: str) -> tuple[Target, ...]:
    """All layers of the toy that adapters may change; not to be changed."""
    return tuple(_layers(plain_modules(family), family))


def _layers(modules: Mapping[str, nn.Module], family: str) -> list[Target]:
    texts: Any = [modules[name] for name in toy_spec(family).text_parts]
    unet: Any = modules["unet"]
    return find_targets(texts, sdxl_view(unet) if family == "sdxl" else unet, with_convolutions=True)


def adapters_on(layers: Sequence[Target], kind: type[Adapter], seed: int, rank: int = 4) -> list[Adapter]:
    """An adapter with random values on each of the layers."""
    made: list[Adapter] = []
    for layer in layers:
        adapter = kind(layer.name, layer.layer, AdapterSize(rank, rank / 2))
        adapter.start()
        randomise(adapter, seed + len(made))
        made.append(adapter)
    return made


def write_adapters(
    path: Path, adapters: Sequence[Adapter], version: str | None, dtype: torch.dtype | None = None, **metadata: str
) -> Path:
    """Their network file; ``version`` is its ss_base_model_version."""
    tensors = {adapter.name: adapter.state_dict() for adapter in adapters}
    prefixes = {adapter.name: adapter.prefix for adapter in adapters}
    told = {} if version is None else {"ss_base_model_version": version}
    write_weights(path, file_tensors(tensors, prefixes), dtype, {**told, **metadata})
    return path


def merged_by_hand(family: str, networks: Sequence[tuple[type[Adapter], int, float]]) -> dict[str, Tensor]:
    """All tensors of the toy after these (type, seed, strength) were added to its layers in memory."""
    modules = copy.deepcopy(plain_modules(family))
    for kind, seed, strength in networks:
        for adapter in adapters_on(_layers(modules, family), kind, seed):
            adapter.multiplier = strength
            adapter.add_to_layer()
    return states(modules)


def assert_same(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 2e-6, rtol: float = 1e-5
) -> None:
    """All tensors alike, by default to the rounding of float32."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=atol, rtol=rtol, msg=lambda text, key=key: f"{key}: {text}")
