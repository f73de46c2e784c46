"""Extraction: what was merged into a model comes out again, and what cannot come out is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.checkpoint.io import read_header
from library.families.sdxl_view import sdxl_view
from library.models.save import save_folder, save_single_file
from library.models.spec import TEXT_PARTS
from networks import extract_lora_from_models, lora
from networks.editing import extract
from networks.kinds import adapter_of, read_network
from networks.targets import Target, find_targets
from tests.toy import toy_modules, toy_spec

RANK = 3


def targets_of(family: str, modules: dict[str, nn.Module], with_convolutions: bool) -> list[Target]:
    texts = [modules[name] for name in TEXT_PARTS if name in modules]
    return find_targets(texts, unet_of(family, modules), with_convolutions)


def unet_of(family: str, modules: dict[str, nn.Module]) -> nn.Module:
    """As the family gives it to networks."""
    unet: Any = modules["unet"]
    return sdxl_view(unet) if family == "sdxl" else unet


def save(path: Path, family: str, modules: dict[str, nn.Module], dtype: torch.dtype | None = None) -> Path:
    spec = toy_spec(family)
    if path.suffix:
        save_single_file(path, spec, modules, dtype)
    else:
        path.mkdir()
        save_folder(path, spec, modules, "epsilon", dtype)
    return path


@torch.no_grad()
def merged(
    family: str,
    tmp_path: Path,
    suffixes: tuple[str, str] = (".safetensors", ".safetensors"),
    convolutions: bool = False,
    also: Callable[[dict[str, nn.Module]], None] | None = None,
) -> tuple[Path, Path, dict[str, Tensor]]:
    """Two model files and the weight changes between them by layer name, each of rank `RANK`."""
    modules = toy_modules(family)
    original = save(tmp_path / f"original{suffixes[0]}", family, modules)
    generator = torch.Generator().manual_seed(4)
    deltas: dict[str, Tensor] = {}
    for target in targets_of(family, modules, convolutions):
        weight: Tensor = target.layer.weight  # type: ignore[assignment]
        up = torch.randn(weight.shape[0], RANK, generator=generator)
        down = torch.randn(RANK, weight.flatten(1).shape[1], generator=generator)
        delta = up @ down * (0.05 / RANK)
        weight.add_(delta.view(weight.shape))
        deltas[target.name] = delta
    if also is not None:
        also(modules)
    return original, save(tmp_path / f"tuned{suffixes[1]}", family, modules), deltas


def run(original: Path, tuned: Path, target: Path, *more: str) -> int:
    words = ["--model_org", str(original), "--model_tuned", str(tuned), "--save_to", str(target), *more]
    return extract_lora_from_models.main(words)


def relative_error(path: Path, deltas: dict[str, Tensor]) -> float:
    """Of all layers together; the layers must be the same."""
    table, _ = read_network(path)
    assert set(table.modules) == set(deltas)
    found = {name: adapter_of(name, own).delta_weight().flatten(1) for name, own in table.modules.items()}
    wrong = sum(float((found[name] - delta).norm()) ** 2 for name, delta in deltas.items())
    return (wrong / sum(float(delta.norm()) ** 2 for delta in deltas.values())) ** 0.5


@pytest.mark.parametrize(
    ("family", "suffixes", "more"),
    [
        ("sd1", (".safetensors", ".ckpt"), ()),
        ("sd2", ("", ""), ("--exact",)),
        ("sdxl", (".safetensors", ""), ()),
    ],
)
def test_a_merged_network_comes_out_again(
    family: str,
    suffixes: tuple[str, str],
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(extract, "SMALL_SIDE", 0)
    original, tuned, deltas = merged(family, tmp_path, suffixes, convolutions=True)
    target = tmp_path / "net.safetensors"
    assert run(original, tuned, target, "--dim", str(RANK), "--conv_dim", str(RANK), *more) == 0
    error = relative_error(target, deltas)
    assert error < 2e-5
    said = capsys.readouterr().err
    told = re.search(r"relative error of the weight change of these layers: (\S+)", said)
    assert told
    assert float(told[1]) < 2e-5
    assert ("randomised singular values" in said) == (not more)
    assert "100.00% of its square lies in the layers of the network, which keeps 100.00% of that" in said
    assert f"{len(deltas)} layers (rank 3 x {len(deltas)}), all values finite" in said
    modules = toy_modules(family)
    texts = [modules[name] for name in TEXT_PARTS if name in modules]
    unet = unet_of(family, modules)
    network, _ = lora.create_network_from_weights(1.0, str(target), None, texts, unet)
    network.apply_to(texts, unet)
    assert network.load_weights(str(target)).loaded == len(deltas)
    metadata = read_header(target)[1]
    # the folder's scheduler says that it predicts noise; without it SD2 would count as predicting velocity
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
    assert metadata["ss_base_model_version"] == version
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "3.0")
    assert metadata["ss_network_args"] == '{"conv_dim": "3", "conv_alpha": "3.0"}'
    assert metadata["modelspec.title"] == "net"
    assert metadata["modelspec.architecture"].endswith("/lora")


def test_what_lies_outside_is_said_with_its_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    squares: dict[str, float] = {}

    def also(modules: dict[str, nn.Module]) -> None:
        unet, text = dict(modules["unet"].named_parameters()), dict(modules["text_encoder"].named_parameters())
        embedding = next(value for key, value in text.items() if "token_embedding" in key)
        for name, parameter, size in (
            ("norms", unet["conv_norm_out.weight"], 0.3),
            ("biases", unet["mid_block.attentions.0.proj_in.bias"], 0.5),
            ("first and last convolution", unet["conv_in.weight"], 0.02),
            ("time and size embeddings", unet["time_embedding.linear_1.weight"], 0.01),
            ("convolutions and ResNets", unet["mid_block.resnets.0.conv1.weight"], 0.01),
            ("token and position embeddings", embedding, 0.0001),
            ("VAE", next(iter(modules["vae"].parameters())), 0.1),
        ):
            parameter.add_(size)
            squares[name] = size**2 * parameter.numel()

    original, tuned, deltas = merged("sd1", tmp_path, also=also)
    target = tmp_path / "net.safetensors"
    assert run(original, tuned, target, "--dim", "2", "--no_metadata") == 0
    said = capsys.readouterr().err
    inside = sum(float(delta.norm()) ** 2 for delta in deltas.values())
    total = inside + sum(squares.values())
    shares = re.findall(r"outside: ([\d.]+)% in 1 tensors: ([^(\n]+?) ?[(\n]", said)
    outside = {name: float(share) / 100 for share, name in shares}
    assert set(outside) == set(squares)
    for name, square in squares.items():
        assert outside[name] == pytest.approx(square / total, abs=1e-4), name
    kept = sum(float(torch.linalg.svdvals(delta)[:2].norm()) ** 2 for delta in deltas.values()) / inside
    match = re.search(r"([\d.]+)% of its square .* keeps ([\d.]+)% of that \(at most ([\d.]+)%", said)
    assert match
    assert [float(value) / 100 for value in match.groups()] == pytest.approx([inside / total, kept, kept], abs=1e-4)
    assert not any(key.startswith("modelspec.") for key in read_header(target)[1])


def test_quiet_text_encoders_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, tuned, deltas = merged("sd1", tmp_path)
    target = tmp_path / "net.safetensors"
    largest = max(float(delta.abs().max()) for name, delta in deltas.items() if name.startswith("lora_te"))
    limit = f"{1.05 * largest:.3g}"
    assert run(original, tuned, target, "--min_diff", limit) == 0
    said = capsys.readouterr().err
    assert f"no weight differs by more than {limit}" in said
    assert "text encoder layers (below --min_diff)" in said
    table, _ = read_network(target)
    assert set(table.modules) == {name for name in deltas if name.startswith("lora_unet")}


def test_half_precision_and_clamp(tmp_path: Path) -> None:
    original, tuned, deltas = merged("sd1", tmp_path)
    half, cut = tmp_path / "half.safetensors", tmp_path / "cut.pt"
    assert run(original, tuned, half, "--dim", "3", "--save_precision", "fp16", "--load_precision", "float") == 0
    assert {info.dtype for info in read_header(half)[0].values()} == {"F16"}
    assert relative_error(half, deltas) < 1e-3
    assert run(original, tuned, cut, "--dim", "3", "--clamp_quantile", "0.9") == 0
    assert 0.01 < relative_error(cut, deltas) < 0.6


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a.safetensors", "sd1", toy_modules("sd1"))
    b = save(tmp_path / "b.safetensors", "sdxl", toy_modules("sdxl"))
    modules, key = toy_modules("sd1"), "mid_block.attentions.0.proj_in.weight"
    modules["unet"].get_parameter(key).data[0, 0] = float("nan")
    broken = save(tmp_path / "broken.safetensors", "sd1", modules)
    target = tmp_path / "net.safetensors"
    for words, text in (
        ((a, b, target), "only models of one kind"),
        ((a, a, target), "there is nothing to extract"),
        ((a, a, tmp_path / "x.zip"), "the name must end in"),
        ((a, tmp_path / "none", target), "there is no file"),
        ((a, b, a), "is one of the files that are read"),
        ((a, broken, target), f"{key}: one of the models has NaN or infinite values there"),
    ):
        assert run(*words) == 1
        assert text in capsys.readouterr().err
    assert not target.exists()
