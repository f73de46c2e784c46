"""Network files under other names: bit for bit there and back, and read by diffusers with the same effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from networks import convert_lora
from networks.adapter import AdapterSize
from networks.editing.layers import model_layers
from networks.kinds import adapter_types, read_network
from networks.weights import read_weights
from tests.merge_fixtures import FAMILIES, VERSIONS, adapters_on, layers_of, write_adapters
from tests.toy import toy_spec, write_toy_folder

TYPES = {kind.__name__: kind for kind in adapter_types()}
LoraAdapter = TYPES["LoraAdapter"]


def convert(source: Path, form: str, target: Path, *more: str) -> int:
    return convert_lora.main(["--model", str(source), "--to", form, "--save_to", str(target), *more])


def raw(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from library.checkpoint.io import open_model_file

    with open_model_file(path) as file:
        return {key: file.tensor(key) for key in file.infos}, dict(file.metadata)


def mixed_network(path: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Ranks and alphas that differ from layer to layer, all kinds of layers."""
    adapters = []
    for number, layer in enumerate(layers_of(family)):
        rank = 2 + number % 3
        (adapter,) = adapters_on([layer], LoraAdapter, number, rank)
        adapter.alpha.fill_((1.0, 3.0, 0.5, rank)[number % 4])
        adapters.append(adapter)
    return write_adapters(path, adapters, VERSIONS[family], dtype, ss_seed="5")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["diffusers", "kohya_diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_is_bit_equal(family: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = mixed_network(tmp_path / "net.safetensors", family, dtype)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert convert(source, form, there) == 0
    assert convert(there, "kohya", back) == 0
    (first, told), (last, told_last) = raw(source), raw(back)
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        assert last[key].dtype is tensor.dtype
        # SD2's projections come back as the matrices that Diffusers has
        assert torch.equal(last[key].reshape(tensor.shape), tensor), key
    assert told == told_last


def test_names(tmp_path: Path) -> None:
    source = mixed_network(tmp_path / "net.safetensors", "sdxl")
    assert convert(source, "diffusers", tmp_path / "peft.safetensors") == 0
    assert convert(source, "kohya_diffusers", tmp_path / "blocks.safetensors") == 0
    keys, metadata = raw(tmp_path / "peft.safetensors")
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert f"unet.{block}.lora_A.weight" in keys
    assert "text_encoder_2.text_model.encoder.layers.2.mlp.fc1.lora_B.weight" in keys
    assert not any("alpha" in key for key in keys)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in config} == {"unet", "text_encoder", "text_encoder_2"}
    assert config["unet.alpha_pattern"].keys() <= {layer.path for layer in model_layers(toy_spec("sdxl"))}
    names = {key.partition(".")[0] for key in raw(tmp_path / "blocks.safetensors")[0]}
    assert f"lora_unet_{block}".replace(".", "_") in names
    assert "lora_te2_text_model_encoder_layers_2_mlp_fc1" in names
    assert not any("input_blocks" in name for name in names)


def pipeline(family: str, folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    nothing = {"tokenizer": None, "tokenizer_2": None} if family == "sdxl" else {"tokenizer": None}
    checker = {} if family == "sdxl" else {"safety_checker": None}
    return kind.from_pretrained(str(folder), **nothing, **checker)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_makes_the_same_of_it(family: str, tmp_path: Path) -> None:
    """Every alpha and rank arrives: the fused weights are those that our adapters give."""
    pytest.importorskip("peft")
    source = mixed_network(tmp_path / "net.safetensors", family)
    assert convert(source, "diffusers", tmp_path / "peft.safetensors") == 0
    folder = write_toy_folder(tmp_path / "model", family)
    pipe = pipeline(family, folder)
    parts = (*toy_spec(family).text_parts, "unet")
    before = {(part, key): t.clone() for part in parts for key, t in getattr(pipe, part).state_dict().items()}
    pipe.load_lora_weights(str(tmp_path), weight_name="peft.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    table = read_weights(source)
    for layer in model_layers(toy_spec(family)):
        own = table.modules[layer.name]
        adapter = LoraAdapter.for_tensors(layer.name, _layer(pipe, layer.folder, layer.path), own)
        adapter.load_state_dict(dict(own))
        path = (
            layer.path if (layer.folder, f"{layer.path}.weight") in before else layer.path.removeprefix("text_model.")
        )
        changed = getattr(pipe, layer.folder).state_dict()[f"{path}.weight"] - before[layer.folder, f"{path}.weight"]
        torch.testing.assert_close(changed, adapter.delta_weight().detach(), atol=2e-6, rtol=1e-4, msg=layer.name)


def _layer(pipe: Any, folder: str, path: str) -> torch.nn.Module:
    modules = dict(getattr(pipe, folder).named_modules())
    return modules.get(path) or modules[path.removeprefix("text_model.")]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_in_diffusers_are_alike(family: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    layers = [place for place in layers_of(family) if not place.is_spatial and "time_emb" not in place.path]
    adapters = adapters_on([place for place in layers if "shortcut" not in place.path], LoraAdapter, 3)
    write_adapters(tmp_path / "net.safetensors", adapters, VERSIONS[family])
    assert convert(tmp_path / "net.safetensors", "diffusers", tmp_path / "peft.safetensors") == 0
    folder = write_toy_folder(tmp_path / "model", family)

    def picture(file: str | None) -> Tensor:
        pipe = pipeline(family, folder)
        pipe.set_progress_bar_config(disable=True)
        if file:
            pipe.load_lora_weights(str(tmp_path), weight_name=file)
        spec = toy_spec(family)
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(1, 77, spec.unet.context_width, generator=generator)
        pooled = torch.randn(1, spec.text_encoders[-1].projection_width or 1, generator=generator)
        texts = {"prompt_embeds": hidden, **({"pooled_prompt_embeds": pooled} if family == "sdxl" else {})}
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        drawn = pipe(
            **texts, latents=latents, num_inference_steps=2, guidance_scale=1.0, height=64, width=64, output_type="pt"
        )
        return drawn.images[0]

    plain, ours, theirs = picture(None), picture("net.safetensors"), picture("peft.safetensors")
    assert (ours - plain).abs().max() > 0.02
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_a_saved_type_may_be_asked_for(tmp_path: Path) -> None:
    source = mixed_network(tmp_path / "net.safetensors", "sd1")
    assert convert(source, "kohya", tmp_path / "half.safetensors", "--save_precision", "bf16") == 0
    assert {tensor.dtype for tensor in raw(tmp_path / "half.safetensors")[0].values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", list(TYPES))
def test_blocks_are_renamed_for_every_type(kind: str, tmp_path: Path) -> None:
    layers = [layer for layer in layers_of("sdxl") if "middle" in layer.name or "layers_0" in layer.name]
    source = write_adapters(tmp_path / "net.safetensors", adapters_on(layers, TYPES[kind], 2), VERSIONS["sdxl"])
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert convert(source, "kohya_diffusers", there) == 0
    assert not raw(source)[0].keys() & {key for key in raw(there)[0] if "_unet_" in key}
    assert convert(there, "kohya", back) == 0
    first, last = raw(source)[0], raw(back)[0]
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = mixed_network(tmp_path / "net.safetensors", "sd1")
    assert convert(source, "diffusers", tmp_path / "peft.pt") == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    adapter = LoraAdapter("lora_unet_odd_one", torch.nn.Linear(4, 4), AdapterSize(2, 1))
    odd = write_adapters(tmp_path / "odd.safetensors", [adapter], "sd_v1")
    assert convert(odd, "diffusers", tmp_path / "peft.safetensors") == 1
    assert "has no layer lora_unet_odd_one" in capsys.readouterr().err
    for kind in TYPES.values():
        layers = [layer for layer in layers_of("sd1") if "mid" in layer.name]
        file = write_adapters(tmp_path / f"{kind.__name__}.safetensors", adapters_on(layers, kind, 1), "sd_v1")
        named = next(iter(read_network(file)[1].values()))
        status = convert(file, "diffusers", tmp_path / "peft.safetensors")
        assert status == (0 if {*named.tensor_names} == {*LoraAdapter.tensor_names} else 1)
        assert status == 0 or named.__name__ in capsys.readouterr().err
