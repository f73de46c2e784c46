"""Hypernetwork files in every known form, against the formula written out."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.generation.hypernetworks import attach_hypernetworks, read_hypernetwork
from library.log import UserError
from library.options.generation import GenNetworkOptions
from tests.generation_fixtures import make_engine, make_job, picture

WIDTH = 32  # of the toy's text
State = dict[str, Tensor]


def linear(state: State, place: str, before: int, after: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state[f"linear{place}.weight"] = torch.randn(after, before, generator=generator) * 0.3
    state[f"linear{place}.bias"] = torch.randn(after, generator=generator) * 0.1


def two_layers(first: str, second: str, seed: int, norm: str | None = None, width: int = WIDTH) -> State:
    state: State = OrderedDict()
    linear(state, first, width, 2 * width, seed)
    if norm is not None:
        state[f"linear{norm}.weight"], state[f"linear{norm}.bias"] = (
            torch.full((2 * width,), 1.5),
            torch.ones(2 * width),
        )
    linear(state, second, 2 * width, width, seed + 1)
    return state


def save(path: Path, keys: State, values: State, width: int = WIDTH, **words: Any) -> str:
    torch.save({width: (keys, values), "step": 100, "name": "toy", **words}, path)
    return str(path)


def plain(state: State, x: Tensor, first: str, second: str) -> Tensor:
    hidden = F.linear(x, state[f"linear{first}.weight"], state[f"linear{first}.bias"])
    return F.linear(hidden, state[f"linear{second}.weight"], state[f"linear{second}.bias"])


X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("first", "second"), [("1", "2"), (".0", ".1")])
def test_older_files_have_two_linear_layers(tmp_path: Path, first: str, second: str) -> None:
    keys, values = two_layers(first, second, 1), two_layers(first, second, 5)
    network = read_hypernetwork(save(tmp_path / "h.pt", keys, values))
    for mlp, state in ((network.keys[WIDTH], keys), (network.values[WIDTH], values)):
        torch.testing.assert_close(mlp(X), plain(state, X, first, second))


@pytest.mark.parametrize("is_last_active", [False, True])
@pytest.mark.parametrize(("word", "function"), [("relu", F.relu), ("swish", F.hardswish), ("softsign", F.softsign)])
def test_activations_and_norms_stand_between_the_layers(
    tmp_path: Path, word: str, function: Any, is_last_active: bool
) -> None:
    state = two_layers(".0", ".4", 1, norm=".2")  # linear, activation, norm, dropout, linear
    file = save(tmp_path / "h.pt", state, state, activation_func=word, activate_output=is_last_active, use_dropout=True)
    hidden = function(F.linear(X, state["linear.0.weight"], state["linear.0.bias"]))
    hidden = F.layer_norm(hidden, (2 * WIDTH,), state["linear.2.weight"], state["linear.2.bias"])
    expected = F.linear(hidden, state["linear.4.weight"], state["linear.4.bias"])
    expected = function(expected) if is_last_active else expected
    torch.testing.assert_close(read_hypernetwork(file).keys[WIDTH](X), expected)


def test_keys_and_values_of_matching_layers_are_changed(tmp_path: Path) -> None:
    keys, values = two_layers("1", "2", 1), two_layers("1", "2", 5)
    file = save(tmp_path / "h.pt", keys, values)
    engine = make_engine()
    before = picture(make_engine(), make_job("a cat"))
    attach_hypernetworks(engine, GenNetworkOptions(hypernetwork_weights=[file], hypernetwork_mul=[0.5]))
    changed = 0
    for path, layer in engine.parts.unet.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(("to_k", "to_v")):
            x = torch.randn(2, 5, layer.in_features)
            state = keys if path.endswith("to_k") else values
            fits = layer.in_features == WIDTH
            changed += fits
            told = x + 0.5 * plain(state, x, "1", "2") if fits else x
            torch.testing.assert_close(layer(x), F.linear(told, layer.weight, layer.bias))
    assert changed >= 16 * 2  # all cross-attention layers; the toy's first level is as wide as its text
    assert abs(picture(engine, make_job("a cat")) - before).max() > 0.01
    silent = make_engine()
    attach_hypernetworks(silent, GenNetworkOptions(hypernetwork_weights=[file], hypernetwork_mul=[0.0]))
    assert (picture(silent, make_job("a cat")) == before).all()


def test_refusals(tmp_path: Path) -> None:
    state = two_layers("1", "2", 1)
    cases = [
        (save(tmp_path / "a.pt", {"conv.weight": torch.ones(2, 2)}, state), "no hypernetwork that is known here"),
        (save(tmp_path / "b.pt", state, state, activation_func="magic"), "its activation magic is not known"),
        (save(tmp_path / "c.pt", state, state, width=64), "go from 32 to 32"),
        (save(tmp_path / "d.pt", *[two_layers("1", "2", 1, width=17)] * 2, width=17), "for another"),
    ]
    torch.save({"a": torch.ones(2)}, tmp_path / "e.pt")
    cases.append((str(tmp_path / "e.pt"), "holds no hypernetwork"))
    for file, message in cases:
        with pytest.raises(UserError, match=message):
            attach_hypernetworks(make_engine(), GenNetworkOptions(hypernetwork_weights=[file]))
    with pytest.raises(UserError, match="--hypernetwork_mul has 1 values for 0"):
        attach_hypernetworks(make_engine(), GenNetworkOptions(hypernetwork_mul=[1.0]))
