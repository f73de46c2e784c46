"""Trees as JSON plus tensors, and what two sessions of a run may differ in."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import library.options as options_module
from library.data.records import BucketRules, DatasetKind, DatasetSpec, Fit, ImageRecord, ResolvedDataset, SubsetSpec
from library.log import UserError
from library.options.scripts import SCRIPTS
from library.training.fingerprint import OPTION_ROLES, Role, data_facts, differences, fingerprint, role_of
from library.training.state_tree import TreeReader, TreeWriter


def round_trip(value):
    writer = TreeWriter()
    text = json.dumps(writer.encode(value, "root"), allow_nan=False)
    return TreeReader(writer.tensors.__getitem__).decode(json.loads(text)), writer


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(-3, 3) | st.sampled_from(["$tensor", "$dict", "$float"])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_plain_trees_come_back_equal_and_of_the_same_types(tree) -> None:
    result, _ = round_trip(tree)
    assert result == tree
    assert repr(result) == repr(tree)  # 1 and 1.0 and True, tuples and lists


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.arange(5, dtype=torch.uint8),
        torch.randn(3, 4).t(),
        torch.zeros(0, 3),
        torch.randn(4).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.randn(2, 2).to(torch.float8_e4m3fn),
    ],
)
def test_tensors_come_back_bit_for_bit(tensor: torch.Tensor) -> None:
    result, _ = round_trip({"state": (tensor, 1)})
    again = result["state"][0]
    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    assert torch.equal(again.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))


def test_special_values() -> None:
    result, _ = round_trip([math.inf, -math.inf, math.nan, torch.bfloat16, np.float32(0.1), np.int64(3)])
    assert result[:2] == [math.inf, -math.inf]
    assert math.isnan(result[2])
    assert result[3] is torch.bfloat16
    assert result[4] == float(np.float32(0.1))
    assert result[5] == 3


def test_one_tensor_in_two_places_is_one_tensor_again() -> None:
    shared = torch.randn(3)
    result, writer = round_trip({"a": shared, "b": [shared], "c": shared.clone()})
    assert len(writer.tensors) == 2
    assert result["a"] is result["b"][0]
    assert result["c"] is not result["a"]


def test_unknown_values_are_refused_or_left_out_on_request() -> None:
    with pytest.raises(UserError, match=r"group\.0\.callback is a function"):
        TreeWriter().encode({"callback": round_trip}, "group.0")
    encoded = TreeWriter().encode({"callback": round_trip, "last_epoch": 3}, "schedule", lenient=True)
    assert TreeReader({}.__getitem__).decode(encoded) == {"last_epoch": 3}


# ---- fingerprints


def all_option_names() -> set[str]:
    groups = [getattr(options_module, name) for name in options_module.__all__ if name.endswith("Options")]
    return {field.name for group in groups for field in dataclasses.fields(group)}


def test_every_role_is_that_of_an_option() -> None:
    assert OPTION_ROLES.keys() - all_option_names() == {"caption_extention"}  # an alias, for the sake of completeness


def test_an_option_without_a_role_could_change_the_result_and_is_compared() -> None:
    saved = fingerprint({**OPTIONS, "brand_new": 1})
    assert differences(saved, fingerprint({**OPTIONS, "brand_new": 2})) == ["brand_new: 1 in the state, 2 now"]


def test_no_secret_is_kept_in_a_state() -> None:
    secret = {name for script in SCRIPTS for name, spec in script.specs().items() if spec.told.secret}
    assert len(secret) > 1
    assert not {name for name in secret if role_of(name) is Role.MATHEMATICS}


OPTIONS = {
    "learning_rate": 1e-4,
    "resolution": (512, 512),
    "text_encoder_lr": [5e-5],
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_train_steps": 100,
    "save_every_n_steps": 10,
    "output_dir": "/a",
    "huggingface_token": "secret",
}


def test_paths_and_cadence_may_differ_mathematics_may_not() -> None:
    saved = json.loads(json.dumps(fingerprint(OPTIONS, {"images": 3}, {"base model": "abc"})))
    free = {**OPTIONS, "save_every_n_steps": 5, "output_dir": "/b", "max_train_steps": 300}
    assert differences(saved, fingerprint(free, {"images": 3}, {"base model": "abc"})) == []
    changed = {**OPTIONS, "learning_rate": 2e-4, "resolution": (512, 768)}
    lines = differences(saved, fingerprint(changed, {"images": 4}, {"base model": "abd"}))
    assert lines == [
        "learning_rate: 0.0001 in the state, 0.0002 now",
        "resolution: [512, 512] in the state, [512, 768] now",
        "data: images: 3 in the state, 4 now",
        "model: base model: abc in the state, abd now",
    ]
    assert "secret" not in json.dumps(saved)
    assert "/a" not in json.dumps(saved)


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        ({}, False),
        ({"lr_scheduler": "cosine"}, True),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10}, False),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1}, True),
        ({"token_warmup_step": 0.5}, True),
        ({"token_warmup_step": 5}, False),
    ],
)
def test_the_length_of_the_run_matters_only_where_something_depends_on_it(change: dict, matters: bool) -> None:
    before, after = {**OPTIONS, **change}, {**OPTIONS, **change, "max_train_steps": 200}
    assert bool(differences(fingerprint(before), fingerprint(after))) is matters


def dataset(folder: str = "/data/a", caption: str = "cat", repeats: int = 2, flip: bool = False) -> ResolvedDataset:
    subset = SubsetSpec(image_dir=folder, num_repeats=repeats)
    if flip:
        subset = dataclasses.replace(subset, augmentation=dataclasses.replace(subset.augmentation, flip_aug=True))
    spec = DatasetSpec(DatasetKind.DREAMBOOTH, 2, BucketRules((512, 512)), (subset,))
    records = tuple(
        ImageRecord(f"img{i}", f"{folder}/img{i}.png", (640, 480), caption, repeats, False, 0) for i in range(3)
    )
    fits = tuple(Fit((512, 512), (683, 512), (0, 0, 640, 480), 0.3) for _ in records)
    return ResolvedDataset(spec, records, fits)


def test_data_are_compared_by_content_not_by_place() -> None:
    saved = fingerprint({}, data_facts([dataset()]))
    assert differences(saved, fingerprint({}, data_facts([dataset("/moved/b")]))) == []
    captions = differences(saved, fingerprint({}, data_facts([dataset(caption="dog")])))
    assert len(captions) == 1
    assert "captions" in captions[0]
    assert any(
        "samples per epoch: 6" in line for line in differences(saved, fingerprint({}, data_facts([dataset(repeats=5)])))
    )
    assert any("rules" in line for line in differences(saved, fingerprint({}, data_facts([dataset(flip=True)]))))


def test_roles_keep_secrets_and_places_out_of_mathematics() -> None:
    for name in ("output_dir", "huggingface_token", "wandb_api_key", "logging_dir", "save_every_n_epochs", "resume"):
        assert role_of(name) is not Role.MATHEMATICS
    for name in ("seed", "network_dim", "min_snr_gamma", "train_batch_size", "mixed_precision"):
        assert role_of(name) is Role.MATHEMATICS
