"""Networks merged into models from file to file: the merged model is the model with the networks attached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.checkpoint.io import open_model_file, read_header, save_safetensors
from library.families.base import ModelFamily
from library.models.load import PART_NAMES, Target, load_parts, recognise
from networks import merge_lora, sdxl_merge_lora
from networks.adapter import Adapter, AdapterSize
from networks.kinds import adapter_types
from networks.targets import Target as Place
from networks.targets import find_targets
from networks.weights import file_tensors, write_weights
from tests.generation_fixtures import family_of, make_engine, make_job, picture, toy_model, write_network
from tests.networks_fixtures import randomise
from tests.toy import toy_modules, toy_spec, write_toy_checkpoint, write_toy_folder

FAMILIES = ("sd1", "sd2", "sdxl")
TYPES = {kind.__name__: kind for kind in adapter_types()}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def run(family: str, *argv: object) -> int:
    tool = sdxl_merge_lora if family == "sdxl" else merge_lora
    v2 = ["--v2"] if family == "sd2" else []
    return tool.main([*v2, *(str(word) for word in argv)])


def views_of(parts: dict[str, nn.Module], family: str) -> tuple[Any, nn.Module]:
    texts = [parts[name] for name in toy_spec(family).text_parts]
    return (texts if len(texts) > 1 else texts[0]), parts["unet"]


def layers_of(parts: dict[str, nn.Module], family: str) -> list[Place]:
    return find_targets(*views_of(parts, family), with_convolutions=True)


def adapters_on(parts: dict[str, nn.Module], family: str, kind: type[Adapter], seed: int) -> list[Adapter]:
    """One with random values on each layer that the type can take, on the models' own layers."""
    made: list[Adapter] = []
    for place in layers_of(parts, family):
        adapter = kind(place.name, place.layer, AdapterSize(4, 2.0))
        adapter.start()
        randomise(adapter, seed + len(made))
        made.append(adapter)
    return made


def write_adapters(path: Path, adapters: Sequence[Adapter], family: str) -> Path:
    tensors = {adapter.name: adapter.state_dict() for adapter in adapters}
    prefixes = {adapter.name: adapter.prefix for adapter in adapters}
    write_weights(path, file_tensors(tensors, prefixes), None, {"ss_base_model_version": VERSIONS[family]})
    return path


def loaded(path: Path) -> dict[str, nn.Module]:
    spec = recognise(path).spec
    names = [name for name in PART_NAMES if name in (*spec.text_parts, "unet", "vae")]
    return load_parts(path, spec, {name: Target(torch.float32) for name in names})


def states(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def merge_by_hand(family: str, networks: Sequence[tuple[type[Adapter], int, float]]) -> dict[str, Tensor]:
    parts = toy_modules(family)
    for kind, seed, ratio in networks:
        for adapter in adapters_on(parts, family, kind, seed):
            adapter.multiplier = ratio
            adapter.add_to_layer()
    return states(parts)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **(tolerance or {"atol": 2e-6, "rtol": 1e-5}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", list(TYPES))
def test_a_merged_model_is_the_model_with_the_network(kind: str, family: str, tmp_path: Path) -> None:
    """Weights and biases of all layers, for every type of adapter, at a strength that is not 1."""
    source = write_toy_checkpoint(tmp_path / "model.safetensors", family)
    network = write_adapters(
        tmp_path / "net.safetensors", adapters_on(toy_modules(family), family, TYPES[kind], 1), family
    )
    target = tmp_path / "merged.safetensors"
    asked = ("--sd_model", source, "--models", network, "--ratios", "0.5", "--save_to", target)
    assert run(family, *asked) == 0
    expected = merge_by_hand(family, [(TYPES[kind], 1, 0.5)])
    found = states(loaded(target))
    assert_same(found, expected)
    plain = states(toy_modules(family))
    changed = [key for key in plain if not torch.equal(found[key], plain[key])]
    assert len(changed) >= len(layers_of(toy_modules(family), family)) - 1
    assert not any(key.startswith("vae.") for key in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_the_attached_network(family: str, tmp_path: Path) -> None:
    network = write_network(tmp_path / "net.safetensors", family, conv_dim="4")
    source = write_toy_checkpoint(tmp_path / "model.safetensors", family)
    target = tmp_path / "merged.safetensors"
    assert run(family, "--sd_model", source, "--models", network, "--ratios", "0.7", "--save_to", target) == 0
    plain = picture(make_engine(family), make_job("a cat"))
    parts = toy_model(family)
    views, names = family_of(family).adapter_views(parts), family_of(family)
    attached = _with_network(names, views, network, 0.7)
    expected = picture(make_engine(family, parts), make_job("a cat"))
    attached.detach()
    modules = loaded(target)
    merged = toy_model(family)
    for name, module in merged.by_name().items():
        module.load_state_dict(modules[name].state_dict())
    drawn = picture(make_engine(family, merged), make_job("a cat"))
    assert abs(expected - plain).max() > 0.02
    assert abs(drawn - expected).max() < 2e-3


def _with_network(family: ModelFamily, views: Any, file: str, multiplier: float) -> Any:
    from networks import lora

    texts = views.text_encoders[0] if len(views.text_encoders) == 1 else views.text_encoders
    network, weights = lora.create_network_from_weights(multiplier, file, None, texts, views.unet, for_inference=True)
    network.apply_to(texts, views.unet)
    network.load_state_dict(weights, strict=False)
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_two_networks_in_half_precision_are_rounded_once(family: str, tmp_path: Path) -> None:
    kind = TYPES["LoraAdapter"]
    source = write_toy_checkpoint(tmp_path / "model.safetensors", family)
    files = [
        write_adapters(
            tmp_path / f"net{seed}.safetensors", adapters_on(toy_modules(family), family, kind, seed), family
        )
        for seed in (1, 500)
    ]
    target = tmp_path / "merged.safetensors"
    asked = ("--sd_model", source, "--models", *files, "--ratios", "0.5", "-0.3", "--save_to", target)
    assert run(family, *asked, "--save_precision", "fp16") == 0
    expected = merge_by_hand(family, [(kind, 1, 0.5), (kind, 500, -0.3)])
    with open_model_file(target) as file:
        assert {info.dtype for info in file.infos.values()} <= {"F16", "I64"}
    found = states(loaded(target))
    exact = sum(bool(torch.equal(found[key], expected[key].half().float())) for key in found)
    assert_same(found, {key: tensor.half().float() for key, tensor in expected.items()}, atol=1e-3, rtol=1e-3)
    assert exact >= 0.8 * len(found)  # the other tensors differ where float32 sums fall on another side of a half


def test_what_no_network_touches_is_passed_through(tmp_path: Path) -> None:
    """The VAE, an average, unknown tensors, a whole number; and the text encoder, with a strength of 0 there."""
    source = write_toy_checkpoint(tmp_path / "toy.safetensors", dtype=torch.float16)
    with open_model_file(source) as file:
        tensors = {key: file.tensor(key) for key in file.infos}
    extra = {"model_ema.decay": torch.rand(2).half(), "my.own": torch.rand(3).half(), "model_ema.n": torch.tensor(3)}
    save_safetensors(tmp_path / "odd.safetensors", {**tensors, **extra}, {"mine": "1", "modelspec.title": "base"})
    network = write_network(tmp_path / "net.safetensors")
    target = tmp_path / "merged.safetensors"
    asked = ["--sd_model", tmp_path / "odd.safetensors", "--models", network, "--save_to", target]
    weights = "text_encoder_mul=0;block_mul=" + ",".join("0" if block != 12 else "1" for block in range(25))
    assert run("sd1", *asked, "--save_precision", "fp16", "--block_weights", weights) == 0
    with open_model_file(target) as file:
        assert file.infos.keys() == {*tensors, *extra}
        different = {key for key in file.infos if not torch.equal(file.tensor(key), {**tensors, **extra}[key])}
        metadata = file.metadata
    assert len(different) == 12
    assert all("middle_block" in key for key in different)
    assert metadata["mine"] == "1"
    assert metadata["modelspec.title"] == "merged"
    assert metadata["modelspec.merged_from"] == "base, net"
    assert (metadata["modelspec.architecture"], metadata["modelspec.prediction_type"]) == (
        "stable-diffusion-v1",
        "epsilon",
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forms", ["folder to folder", "file to folder", "folder to file", "file to pickle"])
def test_every_form_of_a_model(family: str, forms: str, tmp_path: Path) -> None:
    first, last = forms.split(" to ")
    network = write_network(tmp_path / "net.safetensors", family)
    file = write_toy_checkpoint(tmp_path / "model.safetensors", family)
    source = write_toy_folder(tmp_path / "model", family) if first == "folder" else file
    target = tmp_path / {"folder": "merged", "file": "merged.safetensors", "pickle": "merged.ckpt"}[last]
    assert run(family, "--sd_model", source, "--models", network, "--save_to", target) == 0
    plain = tmp_path / "plain.safetensors"
    assert run(family, "--sd_model", file, "--models", network, "--save_to", plain) == 0
    assert_same(states(loaded(target)), states(loaded(plain)), atol=0, rtol=0)
    if first == "file" == last:
        assert read_header(target)[0].keys() == read_header(file)[0].keys()
    again = tmp_path / "again.safetensors"  # a pickle is a source too
    assert run(family, "--sd_model", target, "--models", network, "--ratios", "-1", "--save_to", again) == 0
    assert_same(states(loaded(again)), states(toy_modules(family)), atol=1e-5, rtol=1e-4)


def test_folders_keep_what_is_beside_the_weights(tmp_path: Path) -> None:
    source = write_toy_folder(tmp_path / "model")
    (source / "safety").mkdir()
    (source / "safety" / "note.safetensors").write_bytes(b"not to be read")
    (source / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink(missing_ok=True)
    network = write_network(tmp_path / "net.safetensors")
    assert run("sd1", "--sd_model", source, "--models", network, "--save_to", tmp_path / "merged") == 0
    before, after = ({str(p.relative_to(d)) for p in d.rglob("*")} for d in (source, tmp_path / "merged"))
    assert before == after
    assert (tmp_path / "merged" / "safety" / "note.safetensors").read_bytes() == b"not to be read"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_folder_is_loaded_by_diffusers(family: str, form: str, tmp_path: Path) -> None:
    """Also what diffusers' own fuse_lora makes of the same file."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    network = write_network(tmp_path / "net.safetensors", family)
    source = write_toy_checkpoint(tmp_path / "model.safetensors", family)
    start = write_toy_folder(tmp_path / "model", family) if form == "folder" else source
    target, plain = tmp_path / "merged", tmp_path / "plain"
    assert run(family, "--sd_model", start, "--models", network, "--ratios", "0.6", "--save_to", target) == 0
    assert run(family, "--sd_model", source, "--models", network, "--ratios", "0", "--save_to", plain) == 0
    tokenizers = (
        {} if form == "file" else dict.fromkeys(("tokenizer", "tokenizer_2")[:1 + (family == "sdxl")])
    )
    ours = kind.from_pretrained(str(target), safety_checker=None, **tokenizers)
    theirs = kind.from_pretrained(str(plain), safety_checker=None)
    theirs.load_lora_weights(str(tmp_path), weight_name="net.safetensors")
    theirs.fuse_lora(lora_scale=0.6)
    theirs.unload_lora_weights()
    for name in (*toy_spec(family).text_parts, "unet"):
        assert_same(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict(), atol=1e-5, rtol=1e-4)
    if form == "file":
        assert ours.tokenizer("a cat").input_ids[0] == 49406


@pytest.mark.parametrize(
    ("network_family", "version", "said"),
    [
        ("sdxl", {"ss_base_model_version": "sdxl_base_v1-0"}, "was made for SDXL"),
        ("sdxl", {}, "none of its|another size"),
        ("sd2", {}, "another base model.*another size"),
    ],
)
def test_networks_of_other_models_are_refused(
    network_family: str, version: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors")
    adapters = adapters_on(toy_modules(network_family), network_family, TYPES["LoraAdapter"], 1)
    adapters = [adapter for adapter in adapters if network_family == "sd2" or "input_blocks" in adapter.name]
    tensors = {adapter.name: adapter.state_dict() for adapter in adapters}
    write_weights(tmp_path / "net.safetensors", file_tensors(tensors, dict.fromkeys(tensors, "lora")), None, version)
    target = tmp_path / "merged.safetensors"
    asked = ("--sd_model", source, "--models", tmp_path / "net.safetensors", "--save_to", target)
    assert run("sd1", *asked) == 1
    error = capsys.readouterr().err.strip()
    import re

    assert re.search(said, error)
    assert len(error.splitlines()) == 1
    assert not target.exists()


def test_the_source_may_be_the_target_and_runs_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    network = write_network(tmp_path / "net.safetensors")
    digests: list[str] = []
    for number in range(2):
        path = write_toy_checkpoint(tmp_path / str(number) / "model.safetensors")
        assert run("sd1", "--sd_model", path, "--models", network, "--save_to", path) == 0
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
def test_what_cannot_be(more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = write_network(tmp_path / "net.safetensors")
    source = write_toy_checkpoint(tmp_path / "model.safetensors")
    asked = ["--sd_model", source, "--models", network, "--save_to", tmp_path / "out.safetensors"]
    assert run("sd1", *asked, *(str(tmp_path) if word == "DIR" else word for word in more)) == 1
    assert said in capsys.readouterr().err
