"""OFT: rotations and their limit, layers and block counts, files of the reference's three kinds and of LyCORIS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.measuring import SavedBytes
from library.checkpoint.inspection import check_network_file
from library.log import UserError
from library.plugin import load_network_module
from networks import lora, oft
from networks.adapter import AdapterSize
from networks.network import AdapterNetwork
from networks.oft import OftAdapter, OftLycorisAdapter, rotation_change
from tests.networks_fixtures import TextEncoderView, randomise, run_clip, run_sdxl_unet, run_unet, toy_models
from tests.networks_fixtures import toy_sdxl_models as sdxl_models

LAYERS = {"linear": lambda: nn.Linear(6, 12), "3x3": lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1)}


def blocks_of(groups: int, side: int, size: float, seed: int = 0) -> Tensor:
    return torch.randn(groups, side, side, generator=torch.Generator().manual_seed(seed)) * size


def dense_rotation(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """R as it stands in the paper, in float64."""
    skew = blocks.double() - blocks.double().mT
    if limit and skew.norm() > limit:
        skew = skew * limit / skew.norm()
    one = torch.eye(skew.shape[-1], dtype=torch.float64)
    return torch.block_diag(*((one + q) @ torch.linalg.inv(one - q) for q in skew))


def test_rotation_is_the_papers_and_orthogonal() -> None:
    blocks = blocks_of(3, 4, 0.7)
    got = torch.block_diag(*rotation_change(blocks, 0.0)) + torch.eye(12)
    torch.testing.assert_close(got.double(), dense_rotation(blocks), atol=1e-6, rtol=0)
    assert (got @ got.T - torch.eye(12)).abs().max() < 1e-6
    assert not rotation_change(torch.zeros(3, 4, 4), 1.0).any()


def test_limit_holds_over_all_blocks_together() -> None:
    blocks = blocks_of(3, 4, 0.7)
    norm = float((blocks - blocks.mT).norm())
    for limit in (norm / 3, norm * 2):
        got = torch.block_diag(*rotation_change(blocks, limit)) + torch.eye(12)
        torch.testing.assert_close(got.double(), dense_rotation(blocks, limit), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("limit", [0.0, 3.0])
def test_gradient_of_the_rotation_is_that_of_the_formula(size: float, limit: float) -> None:
    blocks = blocks_of(3, 4, size)
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(9))
    gradients = []
    for rotate in (lambda b: torch.block_diag(*rotation_change(b, limit)), lambda b: dense_rotation(b, limit)):
        leaf = blocks.clone().requires_grad_()
        (rotate(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-4)
    assert gradients[0].any()


def test_nothing_but_output_and_rotation_is_kept() -> None:
    layer = nn.Linear(6, 48).requires_grad_(False)
    adapter = OftAdapter("x", layer, AdapterSize(3, 1.0))
    randomise(adapter)
    x = torch.randn(5, 6)
    y = layer(x)
    with SavedBytes([adapter.oft_blocks]) as saved:
        kept = adapter.combine(y, x)
        assert saved.total <= 4 * (y.numel() + adapter.oft_blocks.numel())
    assert kept.requires_grad


@pytest.mark.parametrize("shape", list(LAYERS))
@pytest.mark.parametrize("multiplier", [0.3, 1.0, -0.5])
def test_forward_and_merge_turn_weight_and_bias(shape: str, multiplier: float) -> None:
    """The reference's merge forgets the bias and the multiplier."""
    torch.manual_seed(0)
    layer = LAYERS[shape]().requires_grad_(False)
    adapter = OftAdapter("x", layer, AdapterSize(3, 1e-2), multiplier)
    with torch.no_grad():
        adapter.oft_blocks.copy_(blocks_of(3, 4, 0.7))
    x = torch.randn(2, 6, 5, 5) if shape == "3x3" else torch.randn(2, 7, 6)
    plain = layer(x)
    full = dense_rotation(adapter.oft_blocks.detach(), limit=1e-2 * 12)
    blend = (multiplier * full + (1 - multiplier) * torch.eye(12)).float()
    channels_last = plain.movedim(1, -1) if shape == "3x3" else plain
    expected = channels_last @ blend
    expected = expected.movedim(-1, 1) if shape == "3x3" else expected
    adapter.attach()
    torch.testing.assert_close(layer(x), expected, atol=2e-6, rtol=1e-5)
    adapter.merge()
    torch.testing.assert_close(layer(x), expected, atol=2e-6, rtol=1e-5)


def test_rotation_is_computed_once_in_use_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(6, 12).requires_grad_(False)
    adapter = OftAdapter("x", layer, AdapterSize(3, 1.0))
    adapter.attach()
    count = 0

    def counted(blocks: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
        nonlocal count
        count += 1
        return rotation_change(blocks, limit, dtype)

    monkeypatch.setattr(oft, "rotation_change", counted)
    x = torch.randn(2, 6)
    adapter.eval()
    with torch.no_grad():
        outputs = [layer(x) for _ in range(3)]
    assert count == 1
    randomise(adapter)
    with torch.no_grad():
        assert not torch.equal(layer(x), outputs[0])
    changed = layer(x)  # a gradient is asked for: nothing kept is used
    changed.sum().backward()
    assert adapter.oft_blocks.grad is not None
    adapter.oft_blocks.data = torch.zeros(3, 4, 4)  # as generation puts weights in
    with torch.no_grad():
        assert torch.equal(layer(x), outputs[0])
    adapter.train()
    adapter.oft_blocks.data.add_(blocks_of(3, 4, 0.5))  # some optimizers step so, unseen by versions
    adapter.eval()
    with torch.no_grad():
        assert not torch.equal(layer(x), outputs[0])


# ---- networks


def make(models: Any, trained: bool = True, dim: int = 4, alpha: float = 1.0, **args: Any) -> AdapterNetwork:
    network = oft.create_network(1.0, dim, alpha, None, *models, **args)
    network.apply_to(*models)
    if trained:
        randomise(network)
    return network


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ({}, 128),
        ({"enable_all_linear": "False", "enable_conv": "False"}, 128),  # the reference takes any text for yes
        ({"enable_all_linear": "True"}, 192),
        ({"enable_conv": "True"}, 128 + 85),  # the toy lacks one shortcut
        ({"enable_all_linear": "True", "enable_conv": "True"}, 277),
    ],
)
def test_layers(args: dict[str, str], count: int) -> None:
    models = toy_models()
    network = make(models, **args)
    assert (network.count("text_encoder"), network.count("unet")) == (0, count)
    assert all(key.startswith("lora_unet_") for key in network.state_dict())


@pytest.mark.parametrize("args", [{}, {"enable_all_linear": "True"}, {"enable_conv": "True"}])
def test_every_kind_of_file_is_read_whole(tmp_path: Path, args: dict[str, str]) -> None:
    """The reference drops convolutions, and takes the first alpha and block count for all."""
    models = toy_models()
    before = run_unet(models[1])
    network = make(models, alpha=0.0, block_dims=",".join(["2", "4", "8", "4", "2"] * 5), **args)
    for index, adapter in enumerate(network.adapters):
        adapter.load_state_dict({**adapter.state_dict(), "alpha": torch.tensor(0.01 if index % 2 else 0.02)})
    trained = run_unet(models[1])
    assert (trained - before).abs().max() > 0.05
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, None)
    assert all(key.startswith("oft_unet_") for key in load_file(file))
    for module in (oft, lora):
        fresh_models = toy_models()
        fresh, weights = module.create_network_from_weights(1.0, file, None, *fresh_models, for_inference=True)
        fresh.apply_to(*fresh_models)
        fresh.load_state_dict(weights)
        fresh.eval()
        assert {type(adapter) for adapter in fresh.adapters} == {OftAdapter}
        torch.testing.assert_close(run_unet(fresh_models[1]), trained, atol=1e-5, rtol=1e-5)
        fresh.detach()
        merged, weights = module.create_network_from_weights(1.0, file, None, *fresh_models, for_inference=True)
        merged.merge_to(*fresh_models, weights)
        torch.testing.assert_close(run_unet(fresh_models[1]), trained, atol=1e-4, rtol=1e-4)


def test_sdxl_names_and_files(tmp_path: Path) -> None:
    encoders, unet = sdxl_models()
    network = make((encoders, unet), enable_all_linear="True", enable_conv="True")
    trained = run_sdxl_unet(unet)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, None)
    assert "oft_unet_middle_block_1_proj_in.oft_blocks" in load_file(file)
    others, fresh_unet = sdxl_models()
    fresh = make((others, fresh_unet), trained=False, enable_all_linear="True", enable_conv="True")
    fresh.load_weights(file)
    assert torch.equal(run_sdxl_unet(fresh_unet), trained)


def test_block_counts_that_do_not_divide_are_refused_at_once() -> None:
    models = toy_models()
    with pytest.raises(UserError, match=r"128 layers .* 7 blocks .*first lora_unet_.* with 32 outputs; 4 or 8 divides"):
        make(models, dim=7)
    with pytest.raises(UserError, match=r"into 100 blocks .*; 32 divides all"):
        make(models, dim=100)
    with pytest.raises(UserError, match=r"conv_\*.*enable_conv"):
        make(models, conv_dim="4")
    with pytest.raises(UserError, match="must be True or False"):
        make(models, enable_conv="maybe")


def test_what_oft_cannot_do_is_said(caplog: pytest.LogCaptureFixture) -> None:
    models = toy_models()
    with pytest.raises(UserError, match=r"loraplus_\*: networks\.oft has no tensors"):
        make(models, loraplus_lr_ratio="4")
    make(models, rank_dropout="0.2", neuron_dropout=0.1, module_dropout="0.5")
    assert "only module_dropout acts" in caplog.text


def test_the_report_says_how_far_it_turns(tmp_path: Path) -> None:
    models = toy_models()
    network = make(models, trained=False)
    first = network.adapters[0]
    randomise(first)
    file = tmp_path / "net.safetensors"
    network.save_weights(str(file), None, None)
    check = replace(check_network_file(file, oft.inspect_weights), title=oft.change_title())
    moved = {change.block: change.norm for change in check.blocks if change.norm}
    expected = dense_rotation(first.state_dict()["oft_blocks"]) - torch.eye(32)
    assert moved == {"down_blocks_0": pytest.approx(float(expected.norm()), rel=1e-4)}
    assert len(check.unmoved) == 127
    assert any("how far outputs are turned" in line for line in check.lines())
    assert check.unmeasured == 0


# ---- LyCORIS


@pytest.mark.parametrize("shape", list(LAYERS))
@pytest.mark.parametrize("args", [{}, {"rescaled": True}, {"constraint": 0.02}], ids=["plain", "rescaled", "limited"])
def test_layers_of_lycoris_turn_as_there(shape: str, args: dict[str, Any]) -> None:
    diag_oft = pytest.importorskip("lycoris.modules.diag_oft")
    torch.manual_seed(0)
    layer = LAYERS[shape]().requires_grad_(False)
    theirs = diag_oft.DiagOFTModule("x", layer, lora_dim=4, **args)
    randomise(theirs, size=0.9)
    if "rescaled" in args:
        theirs.rescale.data.add_(1.0)
    x = torch.randn(2, 6, 5, 5) if shape == "3x3" else torch.randn(2, 7, 6)
    plain = layer(x)
    expected = theirs(x)
    assert (expected - plain).abs().max() > 0.05
    own = OftLycorisAdapter.for_tensors("x", layer, theirs.state_dict())
    own.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(own.combine(plain, x), expected, atol=1e-5, rtol=1e-5)
    own.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_a_network_of_lycoris_is_read(tmp_path: Path) -> None:
    pytest.importorskip("lycoris")
    module = load_network_module("lycoris.kohya")
    encoder, unet = toy_models()
    view = TextEncoderView(encoder)
    before = run_unet(unet), run_clip(encoder)
    arguments = {"preset": "attn-mlp", "algo": "diag-oft", "dropout": "0.0", "rescaled": "True"}
    network = module.create_network(1.0, 4, 1.0, None, view, unet, neuron_dropout=None, **arguments)
    network.apply_to(view, unet, True, True)
    randomise(network)
    for name, parameter in network.named_parameters():
        if name.endswith("rescale"):
            parameter.data.add_(1.0)
    theirs = run_unet(unet), run_clip(encoder)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, torch.float32, {})
    models = toy_models()
    ours, weights = lora.create_network_from_weights(1.0, file, None, *models, for_inference=True)
    assert {type(adapter) for adapter in ours.adapters} == {OftLycorisAdapter}
    ours.apply_to(*models)
    ours.load_state_dict(weights)
    for got, expected, base in zip((run_unet(models[1]), run_clip(models[0])), theirs, before, strict=True):
        assert (expected - base).abs().max() > 0.02
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    again = str(tmp_path / "again.safetensors")
    ours.save_weights(again, None, None)
    assert load_file(again).keys() == load_file(file).keys()


def test_related_kinds_are_not_mixed_up(tmp_path: Path) -> None:
    """The same names of tensors under another prefix mean something else."""
    models = toy_models()
    network = make(models)
    file, other = str(tmp_path / "net.safetensors"), str(tmp_path / "other.safetensors")
    network.save_weights(file, None, None)
    tensors = {key.replace("oft_unet", "lora_unet"): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, other)
    network.load_weights(file)
    with pytest.raises(UserError, match=r"related kind.*--dim_from_weights"):
        network.load_weights(other)
    save_file({key: t[None] if t.dim() == 3 else t for key, t in tensors.items()}, other)
    with pytest.raises(UserError, match=r"BOFT.*lycoris\.kohya"):
        lora.create_network_from_weights(1.0, other, None, *toy_models())
