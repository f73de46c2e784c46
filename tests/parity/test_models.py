"""Our reading and writing of whole models against diffusers': the same tensors, the same predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from library.checkpoint.io import read_header, save_safetensors
from library.families import family_for
from library.families.base import ModelParts, TextSettings
from library.log import UserError
from library.models import build
from library.models.load import recognise
from library.models.spec import UNetSpec
from library.options import ModelOptions
from tests.toy import toy_modules, toy_spec, write_toy_checkpoint, write_toy_folder

FAMILIES = ("sd1", "sd2")


def load(path: Path, family: str, **options: Any) -> ModelParts:
    chosen = ModelOptions(pretrained_model_name_or_path=str(path), v2=family == "sd2", **options)
    return family_for(chosen).load(chosen)


def save_diffusers(parts: ModelParts, folder: Path, dtype: torch.dtype | None = None) -> Path:
    family_for(ModelOptions(v2=parts.spec.family == "sd2")).save_diffusers(parts, folder, dtype)
    return folder


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    first, second = build.canonical_state(ours), build.canonical_state(theirs)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key].float(), second[key].float())]
    assert different == []


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(
        tmp_path_factory.mktemp(family) / f"{family}.safetensors", family, seed=3, drawn_vectors=True
    )


@pytest.fixture(scope="module")
def parts(checkpoint: Path, family: str) -> ModelParts:
    return load(checkpoint, family)


@pytest.fixture(scope="module")
def folder(parts: ModelParts, family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusers(parts, tmp_path_factory.mktemp("folder") / family)


def test_single_file_is_read_as_diffusers_reads_it(
    checkpoint: Path, folder: Path, parts: ModelParts, family: str
) -> None:
    pipeline: Any = StableDiffusionPipeline.from_single_file(
        str(checkpoint), config=str(folder), local_files_only=True, torch_dtype=torch.float32, safety_checker=None
    )
    assert_same(parts.unet, pipeline.unet)
    assert_same(parts.vae, pipeline.vae)
    assert_same(parts.text_encoders[0], pipeline.text_encoder)
    assert_same_predictions(parts, pipeline, family)


def test_our_folder_is_read_by_diffusers(folder: Path, parts: ModelParts, family: str) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    assert_same(parts.unet, pipeline.unet)
    assert_same(parts.vae, pipeline.vae)
    assert_same(parts.text_encoders[0], pipeline.text_encoder)
    assert_same_predictions(parts, pipeline, family)


def assert_same_predictions(parts: ModelParts, pipeline: Any, family: str) -> None:
    ours = family_for(ModelOptions(v2=family == "sd2"))
    settings = TextSettings()
    generator = torch.Generator().manual_seed(0)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    images_BCHW = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    timesteps_B = torch.tensor([1, 900])
    captions = ["a photo of a cat", ""]
    with torch.no_grad():
        condition = ours.encode(parts.text_encoders, ours.tokenize(captions, settings), settings)
        ids_BT = pipeline.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        theirs_BTD = pipeline.text_encoder(ids_BT).last_hidden_state
        torch.testing.assert_close(condition.hidden_BTD, theirs_BTD, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            ours.predict(parts.unet, latents_BCHW, timesteps_B, condition),
            pipeline.unet(latents_BCHW, timesteps_B, theirs_BTD).sample,
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            ours.encode_images(parts.vae, images_BCHW).mean, pipeline.vae.encode(images_BCHW).latent_dist.mean
        )
        torch.testing.assert_close(
            ours.decode_latents(parts.vae, latents_BCHW), pipeline.vae.decode(latents_BCHW / 0.18215).sample
        )


def test_folder_and_file_hold_the_same(folder: Path, parts: ModelParts, family: str) -> None:
    again = load(folder, family)
    assert again.spec == parts.spec
    for ours, theirs in zip(parts.modules(), again.modules(), strict=True):
        assert_same(ours, theirs)


def test_folder_saved_by_the_libraries_is_read(parts: ModelParts, family: str, tmp_path: Path) -> None:
    parts.unet.save_pretrained(tmp_path / "unet")
    parts.vae.save_pretrained(tmp_path / "vae")
    parts.text_encoders[0].save_pretrained(tmp_path / "text_encoder")  # type: ignore[operator]
    again = load(tmp_path, family)
    assert again.spec == parts.spec
    for ours, theirs in zip(parts.modules(), again.modules(), strict=True):
        assert_same(ours, theirs)


def test_saved_checkpoint_equals_the_one_that_was_read(
    checkpoint: Path, parts: ModelParts, family: str, tmp_path: Path
) -> None:
    ours = family_for(ModelOptions(v2=family == "sd2"))
    ours.save_checkpoint(parts, tmp_path / "again.safetensors", None, read_header(checkpoint)[1])
    ours.save_checkpoint(parts, tmp_path / "half.safetensors", torch.float16, {"modelspec.title": "t"})
    first, second = load_file(checkpoint), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    infos, metadata = read_header(tmp_path / "half.safetensors")
    assert metadata == {"modelspec.title": "t"}
    assert {info.dtype for info in infos.values()} == {"F16"}


def test_sd2_keeps_the_unused_tensors_of_its_source(tmp_path: Path) -> None:
    path = write_toy_checkpoint(tmp_path / "a.safetensors", "sd2")
    state = load_file(path)
    extra = [key for key in state if ".resblocks.2." in key or key.endswith(("text_projection", "logit_scale"))]
    assert len(extra) == 14
    for key in extra:
        state[key] = torch.randn(state[key].shape)
    save_file(state, path)
    family_for(ModelOptions(v2=True)).save_checkpoint(load(path, "sd2"), tmp_path / "b.safetensors", None)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in extra)


def test_half_precision_file_is_loaded_in_the_wanted_type(tmp_path: Path, family: str) -> None:
    path = write_toy_checkpoint(tmp_path / "h.safetensors", family, dtype=torch.float16)
    options = ModelOptions(pretrained_model_name_or_path=str(path), v2=family == "sd2")
    loaded = family_for(options).load(options, dtype=torch.bfloat16, part_dtypes={"vae": torch.float32})
    assert {tensor.dtype for tensor in loaded.unet.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in loaded.vae.parameters()} == {torch.float32}
    assert not any(tensor.requires_grad for module in loaded.modules() for tensor in module.parameters())
    assert not any(module.training for module in loaded.modules())
    assert not any(
        tensor.is_meta for module in loaded.modules() for tensor in (*module.parameters(), *module.buffers())
    )


# ---- files as they are in the wild


@pytest.mark.parametrize("kind", ["ckpt", "old text names", "ema and junk", "projections as kernels", "no last block"])
def test_variants_of_the_same_model(
    checkpoint: Path, parts: ModelParts, family: str, tmp_path: Path, kind: str
) -> None:
    state = load_file(checkpoint)
    path = tmp_path / "variant.safetensors"
    if kind == "ckpt":
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": state, "epoch": 1, "global_step": 2}, path)
        state = {}
    elif kind == "old text names":
        state = {key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()}
    elif kind == "ema and junk":
        state["model_ema.decay"] = torch.tensor(0.9)
        state["alphas_cumprod"] = torch.rand(1000)
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state["cond_stage_model.model.attn_mask"] = torch.zeros(77, 77)
        state["first_stage_model.loss.logvar"] = torch.tensor(0.0)
        state["somebody.else"] = torch.zeros(1)
    elif kind == "projections as kernels":
        for key in state:
            if key.endswith(("proj_in.weight", "proj_out.weight")) and state[key].dim() == 2:
                state[key] = state[key][:, :, None, None]
    elif kind == "no last block":
        state = {key: value for key, value in state.items() if not key.endswith(("text_projection", "logit_scale"))}
    if state:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    again = load(path, family)
    assert again.spec == parts.spec
    for ours, theirs in zip(parts.modules(), again.modules(), strict=True):
        assert_same(ours, theirs)


def test_sd2_projections_are_matrices_in_memory_also_from_a_folder_of_kernels(tmp_path: Path) -> None:
    import json

    folder = write_toy_folder(tmp_path / "f", "sd2")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_linear_projection": False}))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    for key in state:
        if key.endswith(("proj_in.weight", "proj_out.weight")):
            state[key] = state[key][:, :, None, None].contiguous()
    save_file(state, weights)
    loaded = load(folder, "sd2")
    assert loaded.spec == toy_spec("sd2")
    assert_same(loaded.unet, toy_modules("sd2")["unet"])


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_wrong_tensors_are_listed(tmp_path: Path, change: str, layout: str) -> None:
    if layout == "file":
        path = weights = write_toy_checkpoint(tmp_path / "m.safetensors")
        key = "model.diffusion_model.time_embed.0.weight"
    else:
        path = write_toy_folder(tmp_path / "m")
        weights, key = path / "unet" / "diffusion_pytorch_model.safetensors", "time_embedding.linear_1.weight"
    state = load_file(weights)
    if change == "missing":
        del state[key]
        key_b = key.replace("weight", "bias")
        del state[key_b]
    elif change == "unknown":
        key = key.replace("weight", "strange")
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.zeros(3, 3)
    save_file(state, weights)
    words = {"missing": "2 missing", "unknown": "1 unknown", "shape": "1 tensors have a wrong shape"}[change]
    with pytest.raises(UserError, match=words) as caught:
        load(path, "sd1")
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- a VAE of its own


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """A checkpoint, a folder and the module of a VAE that is not that of the other toys."""
    place = tmp_path_factory.mktemp("vae")
    module = toy_modules("sd2", seed=9)["vae"]
    checkpoint = write_toy_checkpoint(place / "other.safetensors", "sd2", seed=9)
    return checkpoint, write_toy_folder(place / "other", "sd2", seed=9), module


@pytest.mark.parametrize(
    "form", ["pipeline folder", "vae folder", "checkpoint", "bare file", "bare ckpt", "diffusers file", "diffusers bin"]
)
def test_every_form_of_vae(tmp_path: Path, other_vae: tuple[Path, Path, nn.Module], form: str) -> None:
    checkpoint, folder, module = other_vae
    prefix = "first_stage_model."
    bare = {key[len(prefix) :]: value for key, value in load_file(checkpoint).items() if key.startswith(prefix)}
    diffusers = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    ready = {"pipeline folder": folder, "vae folder": folder / "vae", "checkpoint": checkpoint}
    place = ready.get(form, tmp_path / form)
    if form == "bare file":
        place = place.with_suffix(".safetensors")
        save_file(bare, place)
    elif form == "bare ckpt":
        torch.save({"state_dict": {**bare, "loss.logvar": torch.zeros(1)}}, place)
    elif form == "diffusers file":
        place = place.with_suffix(".safetensors")
        old = {key.replace("to_out.0.", "proj_attn.").replace("to_q.", "query."): v for key, v in diffusers.items()}
        save_file(old, place)
    elif form == "diffusers bin":
        place = place.with_suffix(".bin")
        torch.save(diffusers, place)
    options = ModelOptions(vae=str(place))
    assert_same(family_for(options).load_vae(options), module)


def test_vae_replaces_that_of_the_model(
    checkpoint: Path, parts: ModelParts, family: str, other_vae: tuple[Path, Path, nn.Module]
) -> None:
    loaded = load(checkpoint, family, vae=str(other_vae[0]))
    assert_same(loaded.vae, other_vae[2])
    assert_same(loaded.unet, parts.unet)
    assert loaded.vae_source is not None
    assert loaded.vae_source.name == "other.safetensors"


def test_libraries_read_our_parts(folder: Path, parts: ModelParts) -> None:
    assert_same(UNet2DConditionModel.from_pretrained(folder, subfolder="unet"), parts.unet)
    assert_same(AutoencoderKL.from_pretrained(folder, subfolder="vae"), parts.vae)


def test_a_folder_with_a_vae_of_another_kind_is_one_line(tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderTiny", "encoder_block_out_channels": [64, 64], "latent_channels": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ModelOptions(vae=str(tmp_path))
    with pytest.raises(UserError, match=r"--vae .* holds AutoencoderTiny.* is an AutoencoderKL"):
        family_for(options).load_vae(options)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ],
)
def test_tensors_of_impossible_shapes_are_one_line(tmp_path: Path, key: str) -> None:
    tensors = {**load_file(write_toy_checkpoint(tmp_path / "toy.safetensors")), key: torch.ones(3)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd\.safetensors has tensors of impossible shapes"):
        recognise(tmp_path / "odd.safetensors")


def test_vae_file_without_vae(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"lora.weight": torch.zeros(1)})
    options = ModelOptions(vae=str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match=r"--vae .*no VAE"):
        family_for(options).load_vae(options)


def test_lowest_level_of_one_cell_takes_one_picture() -> None:
    """Group norms of a single value, which the functional form of torch refuses: alone as in a batch."""
    spec = UNetSpec(widths=(32, 32, 32, 32), context_width=32)
    module = build.empty_unet(spec)
    generator = torch.Generator().manual_seed(1)
    shapes = build.shapes_of(module)
    unet: Any = build.fill(
        module, [(k, torch.randn(s, generator=generator) * 0.1) for k, s in shapes.items()], torch.float32, "cpu"
    )
    latents_BCHW, text_BTD = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    both_BCHW = unet(latents_BCHW, 5, text_BTD).sample
    alone_BCHW = unet(latents_BCHW[:1], 5, text_BTD[:1]).sample
    assert float(both_BCHW.std()) > 1e-3
    torch.testing.assert_close(alone_BCHW, both_BCHW[:1], rtol=1e-4, atol=1e-5)
