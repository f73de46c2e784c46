"""Networks merged with each other: the result is the weighted sum of the weight changes, exact or of its best rank."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.log import UserError
from library.options.scripts import MERGE_LORA, SDXL_MERGE_LORA, SVD_MERGE_LORA
from library.options.settings import ScriptOptions
from networks import merge_lora, sdxl_merge_lora, svd_merge_lora
from networks.editing.addends import Addend, family_of_network, read_addends
from networks.editing.combine import CombinePlan, balanced, clamped, combine, rotation
from networks.editing.convert import to_kohya_diffusers
from networks.editing.report import check_file
from networks.kinds import adapter_of, adapter_types, read_network
from networks.weights import write_weights
from tests.generation_fixtures import family_of, toy_model, write_network
from tests.house.source_map import ROOT
from tests.merge_fixtures import VERSIONS, adapters_on, layers_of, write_adapters

TYPES = {kind.__name__: kind for kind in adapter_types()}
FAMILIES = ("sd1", "sd2", "sdxl")
Tool = Callable[[list[str]], int]


def run(tool: Tool, files: Sequence[object], ratios: Sequence[float], target: Path, *more: object) -> int:
    asked = ["--models", *files, "--ratios", *ratios, "--save_to", target, *more]
    return tool([str(word) for word in asked])


@functools.cache
def _some_layers(family: str) -> tuple:
    """Linear layers, 1x1 and 3x3 convolutions of the U-Net's middle, and a text encoder's."""
    return tuple(layer for layer in layers_of(family) if "mid" in layer.name or "layers_0" in layer.name)


def lora_file(path: Path, family: str = "sd1", seed: int = 1, rank: int = 4, **metadata: str) -> Path:
    adapters = adapters_on(_some_layers(family), TYPES["LoraAdapter"], seed, rank)
    return write_adapters(path, adapters, VERSIONS[family], **metadata)


def changes(path: object) -> dict[str, Tensor]:
    """The weight change of each module of a file, computed the plain way."""
    table, kinds = read_network(str(path))
    return {name: adapter_of(name, own, kinds[name]).delta_weight() for name, own in table.modules.items()}


def assert_is_sum(found: Path, terms: Sequence[tuple[float, object]], tolerance: float = 2e-6) -> None:
    parts = [(ratio, changes(file)) for ratio, file in terms]
    result = changes(found)
    assert result.keys() == {name for _, part in parts for name in part}
    for name, change in result.items():
        expected = sum(ratio * part[name].reshape(change.shape) for ratio, part in parts if name in part)
        assert isinstance(expected, Tensor)
        error = float((change - expected).norm() / expected.norm())
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [(4, 4), (2, 6)])
def test_the_weighted_sum_is_exact(family: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    """The reference: cross terms for equal ranks, an error for different ones."""
    files = [lora_file(tmp_path / f"{rank}{seed}.safetensors", family, seed, rank) for seed, rank in enumerate(ranks)]
    target = tmp_path / "sum.safetensors"
    tool = sdxl_merge_lora.main if family == "sdxl" else merge_lora.main
    assert run(tool, files, (0.5, 0.7), target) == 0
    assert_is_sum(target, [(0.5, files[0]), (0.7, files[1])])
    check = check_file(target)
    assert dict(check.ranks) == {sum(ranks): check.modules}
    assert not check.problems
    _, metadata = read_network(target)[0], read_network(target)[0].metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(sum(ranks)), f"{sum(ranks)}.0")
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == str(sum(ranks))
    assert metadata["ss_base_model_version"] == VERSIONS[family]
    assert metadata["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("ratio", [0.5, -0.5, 2.0])
def test_the_ratio_means_the_ratio(ratio: float, tmp_path: Path) -> None:
    """The reference gives its square, with its sign."""
    file, target = lora_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert run(merge_lora.main, [file], [ratio], target) == 0
    assert_is_sum(target, [(ratio, file)])


def test_layers_of_one_network_only_and_half_precision(tmp_path: Path) -> None:
    whole = lora_file(tmp_path / "a.safetensors")
    layers = [layer for layer in _some_layers("sd1") if layer.part == "text_encoder"]
    part = write_adapters(tmp_path / "b.safetensors", adapters_on(layers, TYPES["LoraAdapter"], 9, 3), "sd_v1")
    target = tmp_path / "sum.safetensors"
    assert run(merge_lora.main, [whole, part], (1, 1), target, "--save_precision", "fp16") == 0
    assert_is_sum(target, [(1, whole), (1, part)], tolerance=2e-3)
    table, _ = read_network(target)
    assert {t.dtype for own in table.modules.values() for t in own.values()} == {torch.float16}
    assert set(check_file(target).ranks) == {4, 7}
    assert table.metadata["ss_network_dim"] == "Dynamic"


def test_odd_ranks_keep_their_strength_in_bf16(tmp_path: Path) -> None:
    """bfloat16 cannot hold 257; alpha is rounded and the factors take up the rest."""
    files = [lora_file(tmp_path / f"{n}.safetensors", seed=n, rank=n) for n in (1, 256)]
    target = tmp_path / "sum.safetensors"
    assert run(merge_lora.main, files, (1, 0.01), target, "--save_precision", "bf16") == 0
    name, change = max(changes(target).items(), key=lambda item: float(item[1].norm()))
    expected = changes(files[0])[name] + 0.01 * changes(files[1])[name]
    assert float((change * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=1e-3)


def test_shuffle_hides_the_parts_and_keeps_the_product(tmp_path: Path) -> None:
    files = [lora_file(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 500)]
    plain, first, again, other = (tmp_path / f"{name}.safetensors" for name in "pqrs")
    assert run(merge_lora.main, files, (1, 1), plain) == 0
    for target, seed in ((first, "7"), (again, "7"), (other, "8")):
        assert run(merge_lora.main, files, (1, 1), target, "--concat", "--shuffle", "--seed", seed) == 0
        assert_is_sum(target, [(1, files[0]), (1, files[1])], tolerance=5e-6)
    downs = [read_network(path)[0].modules for path in (plain, first, again, other)]
    name, key = next(iter(downs[0])), "lora_down.weight"
    assert torch.equal(downs[1][name][key], downs[2][name][key])
    assert not torch.equal(downs[1][name][key], downs[3][name][key])
    # no row of the stack is one of an input's any more
    rows = torch.nn.functional.normalize(downs[1][name][key].flatten(1))
    sources = torch.cat([read_network(file)[0].modules[name][key].flatten(1) for file in files])
    assert float((rows @ torch.nn.functional.normalize(sources).T).abs().max()) < 0.99


def test_block_weights(tmp_path: Path) -> None:
    files = [lora_file(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 500)]
    target = tmp_path / "sum.safetensors"
    weights = ["text_encoder_mul=0.5;unet_mul=2", ",".join("0" if block == 12 else "1" for block in range(25))]
    assert run(merge_lora.main, files, (1, 1), target, "--block_weights", *weights) == 0
    one, two, result = changes(files[0]), changes(files[1]), changes(target)
    for name, change in result.items():
        expected = 2 * one[name] if "mid_block" in name else 0.5 * one[name] + two[name]
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tool", [merge_lora.main, svd_merge_lora.main])
def test_a_lower_rank_is_the_best_of_that_rank(tool: Tool, tmp_path: Path) -> None:
    files = [lora_file(tmp_path / f"{seed}.safetensors", seed=seed, rank=6) for seed in (1, 500)]
    target = tmp_path / "sum.safetensors"
    assert run(tool, files, (0.5, -0.7), target, "--new_rank", "5") == 0
    one, two, result = changes(files[0]), changes(files[1]), changes(target)
    assert dict(check_file(target).ranks) == {5: len(result)}
    for name, change in result.items():
        dense = (0.5 * one[name] - 0.7 * two[name]).flatten(1)
        left, singular, right = torch.linalg.svd(dense, full_matrices=False)
        best = (left[:, :5] * singular[:5]) @ right[:5]
        assert float((change.flatten(1) - best).norm() / dense.norm()) < 1e-5, name


def test_svd_at_the_sum_of_ranks_is_exact_and_never_pads(tmp_path: Path) -> None:
    """The reference clamps, and loses a quarter of random networks; and it fills ranks up with noise."""
    files = [lora_file(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 500)]
    target = tmp_path / "sum.safetensors"
    assert run(svd_merge_lora.main, files, (1, 0.5), target, "--new_rank", "30", "--device", "cpu") == 0
    assert_is_sum(target, [(1, files[0]), (0.5, files[1])], tolerance=1e-5)
    assert max(check_file(target).ranks) == 8
    spatial = [name for name in changes(target) if "conv1" in name or "conv2" in name]
    assert run(svd_merge_lora.main, files, (1, 0.5), target, "--new_rank", "6", "--new_conv_rank", "2") == 0
    modules = read_network(target)[0].modules
    ranks = {name: own["lora_down.weight"].shape[0] for name, own in modules.items()}
    assert spatial
    assert all(rank == (2 if name in spatial else 6) for name, rank in ranks.items())
    arguments = json.loads(read_network(target)[0].metadata["ss_network_args"])
    assert arguments["conv_dim"] == "2"


def test_clamping_is_by_size() -> None:
    up, down = torch.tensor([[-9.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.5, -3.0], [1.0, 4.0]])
    for cut, whole in zip(clamped(up, down, 0.75), (up, down), strict=True):
        assert torch.equal(cut, whole.clamp(-3, 3))
    assert clamped(up, down, 1.0) == (up, down)


def test_balancing_and_rotation_keep_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(20, 4, generator=generator) * 1e-3, torch.randn(4, 30, generator=generator) * 1e3
    down[2] = 0
    even_up, even_down = balanced(up, down)
    torch.testing.assert_close(even_up @ even_down, up @ down)
    lengths = even_up.norm(dim=0) / even_down.norm(dim=1)
    assert torch.allclose(lengths[[0, 1, 3]], torch.ones(3))
    turn = rotation(50, generator)
    torch.testing.assert_close(turn @ turn.T, torch.eye(50), atol=1e-6, rtol=0)
    # of a plain QR the first of them never is
    assert {bool(rotation(4, generator)[0, 0] > 0) for _ in range(20)} == {True, False}


@pytest.mark.parametrize("kind", list(TYPES))
def test_types_with_thin_factors_take_part_and_others_are_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = adapters_on(_some_layers("sd1"), TYPES[kind], 3)
    other = write_adapters(tmp_path / "other.safetensors", adapters, "sd_v1")
    lora, target = lora_file(tmp_path / "lora.safetensors"), tmp_path / "sum.safetensors"
    status = run(merge_lora.main, [lora, other], (1, 0.5), target)
    named = next(iter(read_network(other)[1].values()))  # what such a file is read as
    table = read_network(other)[0]
    name, own = next(iter(table.modules.items()))
    thin = not named.needs_weight and adapter_of(name, own, named).factors() is not None
    if thin:
        assert status == 0
        assert_is_sum(target, [(1, lora), (0.5, other)], tolerance=1e-4)
    else:
        assert status == 1
        assert named.__name__ in capsys.readouterr().err
        assert not target.exists()


def test_names_of_other_programs_meet(tmp_path: Path) -> None:
    """One SDXL file with Stability's block names, the other with those of Diffusers."""
    first, second = (lora_file(tmp_path / f"{seed}.safetensors", "sdxl", seed) for seed in (1, 500))
    table, kinds = read_network(second)
    renamed = tmp_path / "renamed.safetensors"
    write_weights(renamed, to_kohya_diffusers(Addend(table, kinds), "sdxl").tensors, None, {})
    assert not {*read_network(renamed)[0].modules} <= {*table.modules}
    target, expected = tmp_path / "sum.safetensors", tmp_path / "expected.safetensors"
    assert run(sdxl_merge_lora.main, [first, renamed], (1, 0.5), target) == 0
    assert run(sdxl_merge_lora.main, [first, second], (1, 0.5), expected) == 0
    one, two = changes(target), changes(expected)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("families", [("sd1", "sdxl"), ("sd1", "sd2")])
def test_networks_of_different_models_are_refused(
    families: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [lora_file(tmp_path / f"{family}.safetensors", family) for family in families]
    assert run(merge_lora.main, files, (1, 1), tmp_path / "sum.safetensors") == 1
    assert "they cannot be merged" in capsys.readouterr().err


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """SD1 and SD2 files without metadata: the same names, other widths."""
    adapters = [adapters_on(_some_layers(family), TYPES["LoraAdapter"], 1) for family in ("sd1", "sd2")]
    files = [str(write_adapters(tmp_path / f"{n}.safetensors", own, None)) for n, own in enumerate(adapters)]
    with pytest.raises(UserError, match="made for different base models"):
        combine(read_addends(files, None), [], CombinePlan())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_shows_in_names_and_widths(family: str, tmp_path: Path) -> None:
    assert family_of_network(read_addends([str(lora_file(tmp_path / "a.safetensors", family))], None)[0]) == family
    if family != "sd2":  # the toy of SD2 has no width of its own
        file = write_network(tmp_path / "b.safetensors", family)
        assert family_of_network(read_addends([file], None)[0]) == family


def test_prediction_and_titles_in_the_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = lora_file(tmp_path / "one.safetensors", "sd2", **{"modelspec.title": "First", "ss_v2": "True"})
    two = write_adapters(
        tmp_path / "two.safetensors", adapters_on(_some_layers("sd2"), TYPES["LoraAdapter"], 2), "sd_v2_v"
    )
    target = tmp_path / "sum.safetensors"
    assert run(merge_lora.main, [two, two], (1, 1), target, "--v2") == 0
    metadata = read_network(target)[0].metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["modelspec.prediction_type"] == "v"
    assert run(merge_lora.main, [one, two], (1, 1), target) == 0
    metadata = read_network(target)[0].metadata
    assert "suits neither" in caplog.text
    assert metadata["modelspec.merged_from"] == "First, two"
    assert (metadata["ss_v2"], metadata["modelspec.title"]) == ("True", "sum")
    assert run(merge_lora.main, [one], (1,), target, "--no_metadata") == 0
    assert not any(key.startswith("modelspec") for key in read_network(target)[0].metadata)


def test_the_command_line_that_names_another_kind_is_only_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, target = lora_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    for tool, more in ((merge_lora.main, ["--v2"]), (sdxl_merge_lora.main, [])):
        caplog.clear()
        assert run(tool, [file], [1.0], target, *more) == 0
        assert "the file decides" in caplog.text
    caplog.clear()
    assert run(merge_lora.main, [file], [1.0], target) == 0
    assert "the file decides" not in caplog.text


def test_the_merged_network_draws_like_both(tmp_path: Path) -> None:
    """Attached to a model, the sum acts as both networks together."""
    from networks import lora

    files = [write_network(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    target = tmp_path / "sum.safetensors"
    assert run(merge_lora.main, files, (0.5, 0.7), target) == 0

    def merged(*networks: tuple[str, float]) -> dict[str, Tensor]:
        parts = toy_model()
        views = family_of("sd1").adapter_views(parts)
        for file, strength in networks:
            network, weights = lora.create_network_from_weights(
                strength, file, None, views.text_encoders[0], views.unet
            )
            network.merge_to(views.text_encoders[0], views.unet, weights, torch.float32, "cpu")
        return {**parts.unet.state_dict(), **{f"te.{k}": v for k, v in parts.text_encoders[0].state_dict().items()}}

    one, both = merged((str(target), 1.0)), merged((files[0], 0.5), (files[1], 0.7))
    for key, tensor in both.items():
        torch.testing.assert_close(one[key], tensor, atol=2e-6, rtol=1e-5)
    assert math.isfinite(sum(float(tensor.sum()) for tensor in one.values()))


COMMON = {"save_precision": None, "precision": "float", "save_to": None, "models": None, "ratios": None}
INTO_MODEL = {**COMMON, "no_metadata": False, "sd_model": None, "concat": False, "shuffle": False}
OLD_OPTIONS = {
    MERGE_LORA.name: {**INTO_MODEL, "v2": False},
    SDXL_MERGE_LORA.name: INTO_MODEL,
    SVD_MERGE_LORA.name: {**COMMON, "no_metadata": False, "new_rank": 4, "new_conv_rank": None, "device": None},
}


@pytest.mark.parametrize("row", [MERGE_LORA, SDXL_MERGE_LORA, SVD_MERGE_LORA], ids=lambda row: row.name)
def test_options_of_old_command_lines_exist_with_their_defaults(row: ScriptOptions) -> None:
    specs = row.specs()
    for name, default in OLD_OPTIONS[row.name].items():
        assert row.default_of(specs[name]) == default, name
        assert specs[name].choices == (("float", "fp16", "bf16") if "precision" in name else ()), name


def test_help_comes_without_torch() -> None:
    code = "import sys; from networks import {0} as tool\ntry: tool.main(['--help'])\nexcept SystemExit: pass\n"
    for tool in ("merge_lora", "sdxl_merge_lora", "svd_merge_lora", "convert_lora"):
        told = code.format(tool) + "assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "--save_to" in done.stdout
