"""The layers that tools know from a description alone; models read tensor by tensor, whatever form their files have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.checkpoint.io import open_model_file, save_safetensors
from library.checkpoint.sd_keys import HUGGINGFACE_PREFIX
from library.log import UserError
from library.models import build
from library.models.spec import SD1, SD2, SDXL
from library.models.stream import SINGLE_FILE, open_model
from networks.editing.layers import ModelLayer, model_layers
from networks.targets import Target, find_targets
from tests.networks_fixtures import full_models, full_sdxl_models
from tests.toy import toy_modules, write_toy_checkpoint, write_toy_folder

FAMILIES = ("sd1", "sd2", "sdxl")


def said(place: Target | ModelLayer) -> tuple[object, ...]:
    return place.name, place.other_names, place.part, place.block


@pytest.mark.parametrize("family", FAMILIES)
def test_description_and_model_name_the_same_layers(family: str) -> None:
    spec = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}[family]
    encoders, unet = full_sdxl_models() if family == "sdxl" else full_models(family == "sd2")
    targets = find_targets(encoders, unet, with_convolutions=True)
    layers = model_layers(spec)
    assert {said(layer) for layer in layers} == {said(target) for target in targets}
    assert len(layers) == len(targets) == {"sd1": 350, "sd2": 416, "sdxl": 1052}[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["file", "folder", "pickle"])
def test_parts_are_the_tensors_of_the_modules(family: str, form: str, tmp_path: Path) -> None:
    modules = toy_modules(family)
    if form == "folder":
        path = write_toy_folder(tmp_path / "model", family)
    else:
        path = write_toy_checkpoint(tmp_path / f"toy.{'ckpt' if form == 'pickle' else 'safetensors'}", family)
    with open_model(path) as model:
        assert model.is_folder is (form == "folder")
        assert model.parts.keys() == modules.keys()
        fitted = model.fitted(model.parts)
        for name, module in modules.items():
            state = build.canonical_state(module)
            assert fitted[name].keys() == state.keys()
            for key, value in fitted[name].items():
                assert value.shape == tuple(state[key].shape)
                assert torch.equal(value.read(), state[key]), key
                assert model.parts[name][key].shape == tuple(model.parts[name][key].read().shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_changed_is_replaced(family: str, tmp_path: Path) -> None:
    """The middle third of a fused projection, a 1x1 convolution, an odd key: each in the file's own form."""
    source = write_toy_checkpoint(tmp_path / "toy.safetensors", family)
    with open_model_file(source) as file:
        tensors = {key: file.tensor(key) for key in file.infos}
    odd = tmp_path / "odd.safetensors"
    save_safetensors(odd, {**tensors, "model_ema.decay": torch.ones(3), "my.own": torch.arange(3)})
    path = "text_model.encoder.layers.1.self_attn.k_proj.weight"
    with open_model(odd) as model:
        part = model.found.spec.text_parts[-1]
        old = model.parts[part][path]
        halved = {part: {path: type(old)(old.dtype, old.shape, lambda: old.read() / 2)}}
        new = model.in_place(halved)[SINGLE_FILE]
        different = [key for key, value in new.items() if not torch.equal(value.read(), model.stored[""][key].read())]
        assert new.keys() == {*tensors, "model_ema.decay", "my.own"}
        assert len(different) == 1
        before, after = tensors[different[0]], new[different[0]].read()
        rows = slice(None) if family == "sd1" else slice(64, 128)
        expected = before.clone()
        expected[rows] /= 2
        assert torch.equal(after, expected)


def test_old_names_of_text_encoders(tmp_path: Path) -> None:
    source = write_toy_checkpoint(tmp_path / "toy.safetensors")
    level = f"{HUGGINGFACE_PREFIX}text_model."
    with open_model_file(source) as file:
        tensors = {key.replace(level, HUGGINGFACE_PREFIX): file.tensor(key) for key in file.infos}
    save_safetensors(tmp_path / "old.safetensors", tensors)
    with open_model(source) as new, open_model(tmp_path / "old.safetensors") as old:
        key = "text_model.encoder.layers.0.mlp.fc1.weight"
        assert torch.equal(new.parts["text_encoder"][key].read(), old.parts["text_encoder"][key].read())
        value = old.parts["text_encoder"][key]
        more = type(value)(value.dtype, value.shape, lambda: value.read() + 1)
        replaced = old.in_place({"text_encoder": {key: more}})
        own = f"{HUGGINGFACE_PREFIX}encoder.layers.0.mlp.fc1.weight"
        assert torch.equal(replaced[SINGLE_FILE][own].read(), value.read() + 1)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="no whole Stable Diffusion model"), open_model(tmp_path / "x.ckpt"):
        pass
