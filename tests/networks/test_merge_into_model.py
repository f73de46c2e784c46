"""Networks merged into models from file to file: the merged model is the model with the networks attached."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoint.io import open_model_file, read_header, save_safetensors
from library.generation.app import run as draw
from library.models.load import recognise
from library.options.scripts import GEN_IMG
from networks.adapter import bias_of, weight_of
from networks.editing.into_model import Change, changed_layer
from networks.kinds import adapter_types
from tests.generation_fixtures import write_network
from tests.merge_fixtures import (
    FAMILIES,
    VERSIONS,
    adapters_on,
    assert_same,
    layers_of,
    merged_by_hand,
    plain_modules,
    run_merge,
    states,
    states_of_file,
    write_adapters,
)
from tests.toy import toy_spec, write_toy_checkpoint, write_toy_folder

TYPES = {kind.__name__: kind for kind in adapter_types()}
Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The toy's file of a family."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def of(family: str) -> Path:
        file = folder / f"{family}.safetensors"
        return made.setdefault(family, made.get(family) or write_toy_checkpoint(file, family, drawn_vectors=True))

    return of


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A LoRA file for it."""
    folder, made = tmp_path_factory.mktemp("networks"), dict[str, Path]()

    def of(family: str) -> Path:
        path = folder / family / "net.safetensors"
        return made.setdefault(family, made.get(family) or Path(write_network(path, family)))

    return of


# Every type meets one family, and LoRA all three: what a type adds depends on a layer's shape, which families share.
TYPES_AND_FAMILIES = [("LoraAdapter", family) for family in FAMILIES] + [
    (kind, FAMILIES[number % len(FAMILIES)]) for number, kind in enumerate(sorted(TYPES)) if kind != "LoraAdapter"
]


@pytest.mark.parametrize(("kind", "family"), TYPES_AND_FAMILIES)
def test_a_merged_model_is_the_model_with_the_network(kind: str, family: str, model: Source, tmp_path: Path) -> None:
    """Weights and biases of all layers, for every type of adapter, at a strength that is not 1."""
    adapters = adapters_on(layers_of(family), TYPES[kind], 1)
    file = write_adapters(tmp_path / "net.safetensors", adapters, VERSIONS[family])
    target = tmp_path / "merged.safetensors"
    asked = ("--sd_model", model(family), "--models", file, "--ratios", "0.5", "--save_to", target)
    assert run_merge(family, *asked) == 0
    plain, expected = states(plain_modules(family)), merged_by_hand(family, [(TYPES[kind], 1, 0.5)])
    found = states_of_file(target, plain)
    assert_same(found, expected)
    changed = {key for key in plain if not torch.equal(found[key], plain[key])}
    assert len([key for key in changed if key.endswith(".weight")]) == len(layers_of(family))
    assert not any(key.startswith("vae/") for key in changed)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_are_those_of_the_attached_network(
    family: str, model: Source, network: Source, tmp_path: Path
) -> None:
    target = tmp_path / "merged.safetensors"
    asked = ("--sd_model", model(family), "--models", network(family), "--ratios", "0.7", "--save_to", target)
    assert run_merge(family, *asked) == 0

    def picture(name: str, *more: object) -> np.ndarray:
        wanted = ["--prompt", "a cat", "--seed", "5", "--steps", "2", "--W", "64", "--H", "64", "--sampler", "euler"]
        folder = tmp_path / name
        command = [*(["--sdxl"] if family == "sdxl" else []), *wanted, "--outdir", folder, *more]
        assert draw(GEN_IMG, [str(word) for word in command]) == 0
        (file,) = folder.glob("*.png")
        return np.asarray(Image.open(file)).astype(int)

    plain, merged = picture("plain", "--ckpt", model(family)), picture("merged", "--ckpt", target)
    attached = ("--network_weights", network(family), "--network_mul", "0.7")
    expected = picture("attached", "--ckpt", model(family), *attached)
    assert np.abs(expected - plain).max() > 8
    assert np.abs(merged - expected).max() <= 1


def test_the_tensors_of_the_model_stay_as_they_are() -> None:
    """A layer with a bias, by a type that changes it too."""
    adapters = adapters_on(layers_of("sdxl"), TYPES["OftAdapter"], 1)
    adapter, bias = next((one, bias) for one in adapters if (bias := bias_of(one.layer)) is not None)
    weight, bias = weight_of(adapter.layer).detach().clone(), bias.detach().clone()
    before = weight.clone(), bias.clone()
    change = Change(adapter.name, type(adapter), adapter.state_dict(), 0.5)
    changed = changed_layer(weight, bias, [change])
    for given, kept, new in zip((weight, bias), before, changed, strict=True):
        assert torch.equal(given, kept)
        assert new is not None
        assert not torch.equal(given, new)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_networks_in_half_precision_are_rounded_once(family: str, model: Source, tmp_path: Path) -> None:
    kind, seeds = TYPES["LoraAdapter"], (1, 500)
    files = [
        write_adapters(tmp_path / f"net{seed}.safetensors", adapters_on(layers_of(family), kind, seed), None)
        for seed in seeds
    ]
    target = tmp_path / "merged.safetensors"
    asked = ("--sd_model", model(family), "--models", *files, "--ratios", "0.5", "-0.3", "--save_to", target)
    assert run_merge(family, *asked, "--save_precision", "fp16") == 0
    with open_model_file(target) as file:
        assert {info.dtype for info in file.infos.values()} <= {"F16", "I64"}
    expected = merged_by_hand(family, [(kind, 1, 0.5), (kind, 500, -0.3)])
    found = states_of_file(target, expected)
    wrong = sum(int((found[key] != tensor.half().float()).sum()) for key, tensor in expected.items())
    # a value may stand so near the middle of two halves that another order of float32 sums chooses the other one
    assert wrong < 1e-3 * sum(tensor.numel() for tensor in expected.values())


def test_what_no_network_touches_is_passed_through(network: Source, tmp_path: Path) -> None:
    """The VAE, an average, unknown tensors, a whole number; and the text encoder, with a strength of 0 there."""
    source = write_toy_checkpoint(tmp_path / "toy.safetensors", dtype=torch.float16, drawn_vectors=True)
    with open_model_file(source) as file:
        tensors = {key: file.tensor(key) for key in file.infos}
    extra = {"model_ema.decay": torch.rand(2).half(), "my.own": torch.rand(3).half(), "model_ema.n": torch.tensor(3)}
    save_safetensors(tmp_path / "odd.safetensors", {**tensors, **extra}, {"mine": "1", "modelspec.title": "base"})
    target = tmp_path / "merged.safetensors"
    asked = ["--sd_model", tmp_path / "odd.safetensors", "--models", network("sd1"), "--save_to", target]
    weights = "text_encoder_mul=0;block_mul=" + ",".join("1" if block == 12 else "0" for block in range(25))
    assert run_merge("sd1", *asked, "--save_precision", "fp16", "--block_weights", weights) == 0
    with open_model_file(target) as file:
        assert file.infos.keys() == {*tensors, *extra}
        different = {key for key in file.infos if not torch.equal(file.tensor(key), {**tensors, **extra}[key])}
        metadata = file.metadata
    assert len(different) == 12
    assert all("middle_block" in key for key in different)
    assert metadata["mine"] == "1"
    assert metadata["modelspec.title"] == "merged"
    assert metadata["modelspec.merged_from"] == "base, net"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert "modelspec.prediction_type" not in metadata  # neither model nor network says it


def test_what_a_network_says_of_its_model_is_said_of_the_result(tmp_path: Path) -> None:
    source, target = write_toy_checkpoint(tmp_path / "toy.safetensors", "sdxl"), tmp_path / "merged.safetensors"
    adapters = adapters_on(layers_of("sdxl")[:4], TYPES["LoraAdapter"], 1)
    for said, expected in (({}, None), ({"modelspec.prediction_type": "v"}, "v_prediction")):
        file = write_adapters(tmp_path / "net.safetensors", adapters, VERSIONS["sdxl"], **said)
        assert run_merge("sdxl", "--sd_model", source, "--models", file, "--save_to", target) == 0
        assert recognise(target).prediction_type == expected


def test_a_broken_network_is_refused_and_no_network_is_overwritten(
    model: Source, network: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = adapters_on(layers_of("sd1")[:4], TYPES["LoraAdapter"], 1)
    cast(Any, adapters[1]).lora_up.weight.data[0, 0] = float("nan")
    broken = write_adapters(tmp_path / "broken.safetensors", adapters, "sd_v1")
    target = tmp_path / "merged.safetensors"
    assert run_merge("sd1", "--sd_model", model("sd1"), "--models", broken, "--save_to", target) == 1
    assert f"hold NaN or infinite values, first {adapters[1].name}.lora_up.weight" in capsys.readouterr().err
    own = Path(shutil.copy(network("sd1"), tmp_path / "own.safetensors"))
    before = own.read_bytes()
    assert run_merge("sd1", "--sd_model", model("sd1"), "--models", own, "--save_to", own) == 1
    assert "is one of the files that are read" in capsys.readouterr().err
    assert own.read_bytes() == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forms", ["folder to folder", "file to folder", "folder to file", "file to pickle"])
def test_every_form_of_a_model(family: str, forms: str, model: Source, network: Source, tmp_path: Path) -> None:
    """There with strength 1, and from there back with -1."""
    first, last = forms.split(" to ")
    source = write_toy_folder(tmp_path / "model", family, drawn_vectors=True) if first == "folder" else model(family)
    target = tmp_path / {"folder": "merged", "file": "merged.safetensors", "pickle": "merged.ckpt"}[last]
    assert run_merge(family, "--sd_model", source, "--models", network(family), "--save_to", target) == 0
    plain = states(plain_modules(family))
    found = states_of_file(target, plain)
    different = {key for key, tensor in plain.items() if not torch.equal(tensor, found[key])}
    assert len(different) == len([place for place in layers_of(family) if not place.is_spatial]) - _beside(family)
    if last == "pickle":
        assert read_header(target)[0].keys() == read_header(model(family))[0].keys()
    again = tmp_path / "again.safetensors"
    back = ("--models", network(family), "--ratios", "-1", "--save_to", again)
    assert run_merge(family, "--sd_model", target, *back) == 0
    assert_same(states_of_file(again, plain), plain, atol=1e-5, rtol=1e-4)


def _beside(family: str) -> int:
    """Layers without a spatial kernel that the network, which has no convolutions, leaves alone."""
    names = [" ".join((layer.name, *layer.other_names)) for layer in layers_of(family)]
    return sum("time_emb" in name or "shortcut" in name for name in names)


def test_folders_keep_what_is_beside_the_weights(network: Source, tmp_path: Path) -> None:
    source = write_toy_folder(tmp_path / "model", drawn_vectors=True)
    (source / "safety").mkdir()
    (source / "safety" / "note.safetensors").write_bytes(b"not to be read")
    asked = ("--sd_model", source, "--models", network("sd1"), "--save_to", tmp_path / "merged")
    assert run_merge("sd1", *asked) == 0
    before, after = ({str(p.relative_to(d)) for p in d.rglob("*")} for d in (source, tmp_path / "merged"))
    assert before == after
    assert (tmp_path / "merged" / "safety" / "note.safetensors").read_bytes() == b"not to be read"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_loaded_by_diffusers(family: str, model: Source, network: Source, tmp_path: Path) -> None:
    """And is what diffusers' own fuse_lora makes of the same file."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    target, plain = tmp_path / "merged", tmp_path / "plain"
    for folder, ratio in ((target, 0.6), (plain, 0)):
        asked = ("--models", network(family), "--ratios", ratio, "--save_to", folder)
        assert run_merge(family, "--sd_model", model(family), *asked) == 0
    ours = kind.from_pretrained(str(target), safety_checker=None)
    theirs = kind.from_pretrained(str(plain), safety_checker=None)
    theirs.load_lora_weights(str(network(family).parent), weight_name="net.safetensors")
    theirs.fuse_lora(lora_scale=0.6)
    theirs.unload_lora_weights()
    for name in (*toy_spec(family).text_parts, "unet"):
        assert_same(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict(), atol=1e-5, rtol=1e-4)
    assert ours.tokenizer("a cat").input_ids[0] == 49406


@pytest.mark.parametrize(
    ("network_family", "version", "said"),
    [
        ("sdxl", "sdxl_base_v1-0", "was made for SDXL"),
        ("sdxl", None, "none of its"),
        ("sd2", None, "another base model.*another size"),
    ],
)
def test_networks_of_other_models_are_refused(
    network_family: str,
    version: str | None,
    said: str,
    model: Source,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layers = [layer for layer in layers_of(network_family) if layer.part == "unet"]
    adapters = adapters_on(layers, TYPES["LoraAdapter"], 1)
    file, target = write_adapters(tmp_path / "net.safetensors", adapters, version), tmp_path / "merged.safetensors"
    assert run_merge("sd1", "--sd_model", model("sd1"), "--models", file, "--save_to", target) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(said, error)
    assert len(error.splitlines()) == 1
    assert not target.exists()


def test_layers_that_the_model_lacks_are_told(model: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A network of the published text encoder's 12 layers and the toy's two."""
    layers = [layer for layer in layers_of("sd1") if layer.part == "text_encoder"]
    adapters = adapters_on(layers, TYPES["LoraAdapter"], 1)
    for adapter in adapters[6:]:
        adapter.name = adapter.name.replace("layers_1_", "layers_11_")
    file, target = write_adapters(tmp_path / "net.safetensors", adapters, "sd_v1"), tmp_path / "merged.safetensors"
    assert run_merge("sd1", "--sd_model", model("sd1"), "--models", file, "--save_to", target) == 0
    assert "6 of its 12 layers do not exist in the model and are left out" in caplog.text
    plain = states(plain_modules("sd1"))
    found = states_of_file(target, plain)
    assert sum(not torch.equal(found[key], plain[key]) for key in plain) == 6


def test_the_source_may_be_the_target_and_runs_repeat(
    model: Source, network: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    digests: list[str] = []
    for number in range(2):
        path = tmp_path / f"{number}" / "model.safetensors"
        path.parent.mkdir()
        shutil.copy(model("sd1"), path)
        assert run_merge("sd1", "--sd_model", path, "--models", network("sd1"), "--save_to", path) == 0
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--ratios", "1", "2"), "--ratios has 2 numbers for 1 files"),
        (("--block_weights", "1,2,3"), "needs 25 values"),
        (("--block_weights", "unet=2"), "--block_weights unet"),
        (("--save_to", "x.pt"), "is a .safetensors or .ckpt file or a Diffusers folder"),
        (("--save_to", "DIR"), "is no Diffusers model"),
        (("--sd_model", "nowhere.safetensors"), "there is no file"),
    ],
)
def test_what_cannot_be(
    more: tuple[str, ...],
    said: str,
    model: Source,
    network: Source,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.txt").write_text("a folder with something in it")
    asked = ["--sd_model", model("sd1"), "--models", network("sd1"), "--save_to", tmp_path / "out.safetensors"]
    assert run_merge("sd1", *asked, *(str(tmp_path) if word == "DIR" else word for word in more)) == 1
    assert said in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()
