"""ControlNet files: every form gives the same net back, original names are those that diffusers' reader knows."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from library.checkpoint.control_keys import control_rows, encoder_rows
from library.log import UserError
from library.models.build import shapes_of
from library.models.control import (
    control_config,
    empty_control,
    load_control,
    save_control_file,
    save_control_folder,
)
from library.models.load import Target
from library.models.spec import SD1, SD2, SDXL
from tests.control_fixtures import toy_control
from tests.toy import toy_modules, toy_spec

FLOAT = Target(torch.float32)
FAMILIES = ("sd1", "sd2", "sdxl")


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["prefixed", "bare", "diffusers file", "folder", "pickle"])
def test_every_form_gives_the_net_back(family: str, form: str, tmp_path: Path) -> None:
    net, spec, path = toy_control(family), toy_spec(family).unet, tmp_path / "net.safetensors"
    if form == "prefixed":
        save_control_file(path, net, spec)
    elif form == "bare":
        save_control_file(path, net, spec, prefix="")
    elif form == "diffusers file":
        save_file(net.state_dict(), path)
    elif form == "folder":
        save_control_folder(path, net)
    else:
        save_control_file(path, net, spec)
        path, state = tmp_path / "net.pth", load_file(path)
        torch.save({"state_dict": state}, path)
    assert same(load_control(path, spec, FLOAT), net)


@pytest.mark.parametrize("full", [SD1, SD2, SDXL], ids=["sd1", "sd2", "sdxl"])
def test_the_table_covers_full_size_nets(full: Any) -> None:
    net = empty_control(control_config(full.unet))
    rows = list(control_rows(full.unet))
    of_key = shapes_of(net)
    assert {key for _, key, _ in rows} == set(of_key)
    assert len({name for name, _, _ in rows}) == len(rows)
    shapes = {name: of_key[key] for name, key, _ in rows}
    hint = [shapes[f"input_hint_block.{index}.weight"][:2] for index in range(0, 16, 2)]
    channels = [3, 16, 16, 32, 32, 96, 96, 256, 320]
    assert hint == [(after, before) for before, after in itertools.pairwise(channels)]
    zero = [shapes[name] for name in shapes if name.startswith("zero_convs.") and name.endswith("weight")]
    widths = [320] * 4 + [640] * 3 + [1280] * (2 if full is SDXL else 5)
    assert [shape[0] for shape in zero] == widths
    assert all(shape[2:] == (1, 1) for shape in zero)
    assert shapes["middle_block_out.0.weight"] == (1280, 1280, 1, 1)


@pytest.mark.parametrize("family", ["sd1", "sd2"])  # it knows no original names for SDXL
def test_diffusers_own_reader_understands_our_file(family: str, tmp_path: Path) -> None:
    net, path = toy_control(family), tmp_path / "net.safetensors"
    save_control_folder(tmp_path / "config", net)
    save_control_file(path, net, toy_spec(family).unet)
    theirs = cast(Any, ControlNetModel).from_single_file(
        str(path), config=str(tmp_path / "config"), local_files_only=True
    )
    assert same(theirs, net)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_our_folder(family: str, tmp_path: Path) -> None:
    net = toy_control(family)
    save_control_folder(tmp_path / "net", net)
    assert same(ControlNetModel.from_pretrained(tmp_path / "net"), net)


def test_differences_are_added_to_the_models_own_encoder(tmp_path: Path) -> None:
    net, spec = toy_control(), toy_spec().unet
    unet = toy_modules()["unet"]
    state = load_file(save(tmp_path / "net.safetensors", net))
    shared = {f"control_model.{name}": key for name, key, _ in encoder_rows(spec)}
    changed = {
        name: value - unet.state_dict()[shared[name]] if name in shared else value for name, value in state.items()
    }
    save_file({**changed, "difference": torch.zeros(1)}, tmp_path / "difference.safetensors")
    loaded = load_control(tmp_path / "difference.safetensors", spec, FLOAT, unet)
    wanted = net.state_dict()
    assert all(torch.allclose(value, wanted[key], atol=1e-6) for key, value in loaded.state_dict().items())


def save(path: Path, net: Any, family: str = "sd1") -> Path:
    save_control_file(path, net, toy_spec(family).unet)
    return path


def test_small_nets_without_attention_are_read(tmp_path: Path) -> None:
    spec = toy_spec("sdxl").unet
    small = empty_control(control_config(replace(spec, depths=(0, 0, 0), mid_depth=0))).to_empty(device="cpu")
    save_file(
        {key: torch.rand_like(value) for key, value in small.state_dict().items()}, tmp_path / "small.safetensors"
    )
    loaded = load_control(tmp_path / "small.safetensors", spec, FLOAT)
    assert loaded.state_dict().keys() == small.state_dict().keys()


@pytest.mark.parametrize("config", ['{"block_out_channels": [32, 64]}', '{"down_block_types": ["NoBlock"]}'])
def test_folders_that_describe_no_net_are_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"its config\.json describes no ControlNet"):
        load_control(tmp_path, toy_spec("sd1").unet, FLOAT)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "net.safetensors", toy_control("sd2"), "sd2")
    with pytest.raises(UserError, match="wrong shape"):
        load_control(path, toy_spec("sd1").unet, FLOAT)
    save_control_folder(tmp_path / "folder", toy_control("sd2"))
    with pytest.raises(UserError, match="another kind of model"):
        load_control(tmp_path / "folder", toy_spec("sd1").unet, FLOAT)
    save_file({"lllite_unet_x.down.0.weight": torch.zeros(1)}, tmp_path / "lllite.safetensors")
    with pytest.raises(UserError, match="--control_net_lllite_models"):
        load_control(tmp_path / "lllite.safetensors", toy_spec("sdxl").unet, FLOAT)
    state = load_file(path)
    del state["control_model.zero_convs.3.0.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"1 missing: control_model\.zero_convs\.3\.0\.bias"):
        load_control(tmp_path / "cut.safetensors", toy_spec("sd2").unet, FLOAT)
