"""SDXL against diffusers' own pipeline at toy width: files both ways, text condition, sizes, U-Net, a whole picture."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from library.checkpoint.io import read_header, save_safetensors
from library.diffusion.schedule import make_schedule
from library.families import family_for
from library.families.base import Geometry, ModelParts, TextSettings
from library.families.sdxl import SdxlFamily, time_ids
from library.generation.engine import Engine, EngineSettings
from library.generation.prompts import PromptSpec
from library.generation.sample import sample_job
from library.log import UserError
from library.models import build
from library.models.infer import spec_of_file
from library.options import ModelOptions
from library.training.text_source import text_settings
from tests.toy import toy_spec, write_toy_checkpoint, write_toy_folder

FAMILY = SdxlFamily()
SECOND = "conditioner.embedders.1.model."
CAPTIONS = ["a photo of a cat", ""]


def load(path: Path, **options: Any) -> ModelParts:
    chosen = ModelOptions(pretrained_model_name_or_path=str(path), **options)
    return family_for(chosen, "sdxl").load(chosen)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    first, second = build.canonical_state(ours), build.canonical_state(theirs)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key].float(), second[key].float())] == []


def assert_same_parts(ours: ModelParts, theirs: ModelParts) -> None:
    assert ours.spec == theirs.spec
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        assert_same(one, other)


def geometry(*sizes: tuple[int, int, int, int, int, int]) -> Geometry:
    sizes_B6 = torch.tensor(sizes)
    return Geometry(sizes_B6[:, :2], sizes_B6[:, 2:4], sizes_B6[:, 4:])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file with a logit scale, as published ones have it."""
    path = write_toy_checkpoint(
        tmp_path_factory.mktemp("file") / "sdxl.safetensors", "sdxl", seed=3, drawn_vectors=True
    )
    state = load_file(path)
    save_file({**state, SECOND + "logit_scale": torch.tensor(4.6)}, path)
    return path


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> ModelParts:
    return load(checkpoint)


@pytest.fixture(scope="module")
def folder(parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folder") / "sdxl"
    FAMILY.save_diffusers(parts, place, None)
    return place


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """diffusers' reading of our folder."""
    result: Any = StableDiffusionXLPipeline.from_pretrained(str(folder), local_files_only=True)
    result.set_progress_bar_config(disable=True)
    return result


# ---- files


def test_our_folder_is_read_by_diffusers(parts: ModelParts, pipeline: Any) -> None:
    assert_same(parts.unet, pipeline.unet)
    assert_same(parts.vae, pipeline.vae)
    assert_same(parts.text_encoders[0], pipeline.text_encoder)
    assert_same(parts.text_encoders[1], pipeline.text_encoder_2)
    assert pipeline.vae.config.scaling_factor == 0.13025
    assert pipeline.vae.config.force_upcast is True
    assert (pipeline.tokenizer.pad_token_id, pipeline.tokenizer_2.pad_token_id) == (49407, 0)


def test_single_file_is_read_as_diffusers_reads_it(checkpoint: Path, folder: Path, parts: ModelParts) -> None:
    theirs: Any = StableDiffusionXLPipeline.from_single_file(
        str(checkpoint), config=str(folder), local_files_only=True, torch_dtype=torch.float32
    )
    assert_same(parts.unet, theirs.unet)
    assert_same(parts.vae, theirs.vae)
    assert_same(parts.text_encoders[0], theirs.text_encoder)
    assert_same(parts.text_encoders[1], theirs.text_encoder_2)


def test_folder_and_file_hold_the_same(folder: Path, parts: ModelParts) -> None:
    assert parts.spec == toy_spec("sdxl")
    assert_same_parts(parts, load(folder))


def test_projection_is_transposed_in_the_file(checkpoint: Path, parts: ModelParts) -> None:
    stored = load_file(checkpoint)[SECOND + "text_projection"]
    encoder: Any = parts.text_encoders[1]
    assert stored.shape == (64, 48)
    assert torch.equal(encoder.text_projection.weight, stored.T)


def test_projection_named_as_a_linear_layer_is_one(checkpoint: Path, parts: ModelParts, tmp_path: Path) -> None:
    state = load_file(checkpoint)
    state[SECOND + "text_projection.weight"] = state.pop(SECOND + "text_projection").T.contiguous()
    save_file(state, tmp_path / "linear.safetensors")
    assert_same_parts(parts, load(tmp_path / "linear.safetensors"))


def test_saved_checkpoint_equals_the_one_that_was_read(checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(checkpoint)
    state |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "marked.safetensors")
    loaded = load(tmp_path / "marked.safetensors", v_parameterization=True)
    FAMILY.save_checkpoint(loaded, tmp_path / "again.safetensors", None, {"modelspec.title": "t"})
    again = load_file(tmp_path / "again.safetensors")
    del state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert read_header(tmp_path / "again.safetensors")[1] == {"modelspec.title": "t"}


def test_logit_scale_is_not_invented(folder: Path, tmp_path: Path) -> None:
    FAMILY.save_checkpoint(load(folder), tmp_path / "a.safetensors", torch.float16)
    infos, metadata = read_header(tmp_path / "a.safetensors")
    assert SECOND + "logit_scale" not in infos
    assert SECOND + "text_projection" in infos
    assert metadata == {}


def test_folder_with_the_scale_of_older_models_is_mended(folder: Path, tmp_path: Path) -> None:
    write_toy_folder(tmp_path / "m", "sdxl")
    config = tmp_path / "m" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.18215}))
    assert load(tmp_path / "m").spec == toy_spec("sdxl")


def test_pickle_of_half_precision_is_loaded_in_the_wanted_type(checkpoint: Path, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in load_file(checkpoint).items()}
    torch.save({"state_dict": state}, tmp_path / "h.ckpt")
    options = ModelOptions(pretrained_model_name_or_path=str(tmp_path / "h.ckpt"))
    loaded = FAMILY.load(options, dtype=torch.bfloat16, part_dtypes={"vae": torch.float32})
    frozen = [*loaded.unet.parameters(), *loaded.text_encoders[0].parameters(), *loaded.text_encoders[1].parameters()]
    assert {tensor.dtype for tensor in frozen} == {torch.bfloat16}
    assert {tensor.dtype for tensor in loaded.vae.parameters()} == {torch.float32}
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in frozen)


def test_outline_and_vae_alone(checkpoint: Path, parts: ModelParts) -> None:
    options = ModelOptions(pretrained_model_name_or_path=str(checkpoint))
    outline = FAMILY.outline(options)
    assert outline.spec == parts.spec
    assert all(tensor.is_meta for module in outline.modules() for tensor in module.parameters())
    assert [build.shapes_of(module) for module in outline.modules()] == [
        build.shapes_of(module) for module in parts.modules()
    ]
    assert_same(FAMILY.load_vae(options), parts.vae)


# ---- what is refused


def test_other_families_are_refused(tmp_path: Path, checkpoint: Path, folder: Path) -> None:
    write_toy_checkpoint(tmp_path / "sd1.safetensors")
    with pytest.raises(UserError, match=r"is a Stable Diffusion 1\.x model: .* without sdxl_"):
        load(tmp_path / "sd1.safetensors")
    for path in (checkpoint, folder):
        options = ModelOptions(pretrained_model_name_or_path=str(path))
        with pytest.raises(UserError, match=r"is an SDXL model: .*for SDXL"):
            family_for(options).load(options)


def test_refiner_is_refused(checkpoint: Path) -> None:
    infos = {key: info for key, info in read_header(checkpoint)[0].items() if ".embedders.0.transformer" not in key}
    with pytest.raises(UserError, match="refiner"):
        spec_of_file(infos, "x")


@pytest.mark.parametrize("missing", ["text_projection", "ln_final.weight"])
def test_incomplete_file_is_refused(checkpoint: Path, tmp_path: Path, missing: str) -> None:
    state = {key: value for key, value in load_file(checkpoint).items() if key != SECOND + missing}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=missing):
        load(tmp_path / "x.safetensors")


def test_markers_are_checked_against_the_options(checkpoint: Path, tmp_path: Path) -> None:
    state = {**load_file(checkpoint), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_safetensors(tmp_path / "v.safetensors", state)
    with pytest.raises(UserError, match="add --v_parameterization"):
        load(tmp_path / "v.safetensors")
    marked = load(tmp_path / "v.safetensors", v_parameterization=True)
    assert (marked.prediction_type, marked.zero_terminal_snr) == ("v_prediction", True)
    FAMILY.save_diffusers(marked, tmp_path / "v", None)
    again = load(tmp_path / "v", v_parameterization=True)
    assert (again.prediction_type, again.zero_terminal_snr) == ("v_prediction", True)
    assert not load(checkpoint).zero_terminal_snr


# ---- text


def encode(parts: ModelParts, captions: list[str], settings: TextSettings | None = None) -> Any:
    settings = settings or TextSettings()
    with torch.no_grad():
        return FAMILY.encode(parts.text_encoders, FAMILY.tokenize(captions, settings), settings)


def test_text_condition_is_diffusers_own(parts: ModelParts, pipeline: Any) -> None:
    condition = encode(parts, CAPTIONS)
    with torch.no_grad():
        hidden_BTD, _, pooled_BP, _ = pipeline.encode_prompt(
            CAPTIONS, do_classifier_free_guidance=False, device=torch.device("cpu")
        )
    assert condition.hidden_BTD.shape == (2, 77, 96)
    torch.testing.assert_close(condition.hidden_BTD, hidden_BTD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(condition.pooled_BP, pooled_BP, rtol=1e-5, atol=1e-5)


def test_clip_skip_is_2_and_not_changed_by_training(parts: ModelParts) -> None:
    plain, named = encode(parts, CAPTIONS), encode(parts, CAPTIONS, TextSettings(clip_skip=2))
    assert torch.equal(plain.hidden_BTD, named.hidden_BTD)
    last = encode(parts, CAPTIONS, TextSettings(clip_skip=1))
    assert not torch.equal(plain.hidden_BTD, last.hidden_BTD)
    assert torch.equal(plain.pooled_BP, last.pooled_BP)
    assert text_settings(ModelOptions(clip_skip=1), FAMILY).clip_skip is None


def test_long_captions_pool_their_first_row(parts: ModelParts) -> None:
    settings = TextSettings(max_token_length=225)
    long = ", ".join(["a cat on a mat"] * 30)
    condition = encode(parts, [long, "a cat"], settings)
    tokens = FAMILY.tokenize([long, "a cat"], settings)
    assert condition.hidden_BTD.shape == (2, 227, 96)
    encoder: Any = parts.text_encoders[1]
    for index, rows_NT in enumerate(tokens.rows[1].ids_BNT):
        row_T = rows_NT[0]
        place = row_T.tolist().index(49407)  # a full row ends with it
        with torch.no_grad():
            output = encoder.text_model(input_ids=row_T[None])
            expected_P = encoder.text_projection(output.last_hidden_state[0, place])
        torch.testing.assert_close(condition.pooled_BP[index], expected_P, rtol=1e-4, atol=1e-5)
    again = encode(parts, ["a cat"], settings)
    torch.testing.assert_close(again.pooled_BP[0], condition.pooled_BP[1], rtol=1e-4, atol=1e-5)


def test_added_tokens_do_not_move_the_pooled_state(parts: ModelParts) -> None:
    """Some libraries pool at the largest id, which would be the added token's."""
    family = SdxlFamily()
    for tokenizer in family.tokenizers:
        tokenizer.add_tokens(["<new>"])
    encoders: list[Any] = [copy.deepcopy(encoder) for encoder in parts.text_encoders]
    for encoder in encoders:
        encoder.resize_token_embeddings(49409, mean_resizing=False)
    tokens = family.tokenize(["a <new> cat"], TextSettings())
    ids_T = tokens.rows[1].ids_BNT[0, 0]
    assert (int(ids_T[2]), int(ids_T[4])) == (49408, 49407)
    with torch.no_grad():
        pooled_BP = family.encode(encoders, tokens, TextSettings()).pooled_BP
        states_TD = encoders[1].text_model(input_ids=ids_T[None]).last_hidden_state[0]
        expected_P, at_largest_P = encoders[1].text_projection(states_TD[[4, 2]])
    assert pooled_BP is not None
    torch.testing.assert_close(pooled_BP[0], expected_P, rtol=1e-4, atol=1e-5)
    assert (expected_P - at_largest_P).abs().max() > 1e-2


# ---- sizes and U-Net


def test_time_ids_are_in_the_models_order(pipeline: Any) -> None:
    ours_B6 = time_ids(geometry((768, 512, 8, 16, 1024, 640)))
    theirs_B6 = pipeline._get_add_time_ids((768, 512), (8, 16), (1024, 640), torch.float32, 48)
    assert torch.equal(ours_B6, theirs_B6)
    assert ours_B6.dtype == torch.float32


def test_size_embedding_has_the_published_values(parts: ModelParts) -> None:
    unet: Any = build.empty_unet(replace(parts.spec.unet, size_width=256, vector_width=48 + 6 * 256))
    embedding_BD = unet.add_time_proj(torch.tensor([1024.0]))
    expected = torch.tensor([0.98735362, -0.53761721, 0.68345720])
    torch.testing.assert_close(embedding_BD[0, :3], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(embedding_BD[0, 128], torch.tensor(-0.15853338), rtol=0, atol=1e-4)


def test_prediction_is_diffusers_own(parts: ModelParts, pipeline: Any) -> None:
    latents_BCHW = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    timesteps_B = torch.tensor([1, 900])
    sizes = [(768, 512, 8, 16, 1024, 640), (1367, 911, 0, 0, 64, 96)]
    condition = encode(parts, CAPTIONS)
    with torch.no_grad():
        ours = FAMILY.predict(parts.unet, latents_BCHW, timesteps_B, condition, geometry(*sizes))
        added = {"text_embeds": condition.pooled_BP, "time_ids": torch.tensor(sizes, dtype=torch.float32)}
        theirs = pipeline.unet(latents_BCHW, timesteps_B, condition.hidden_BTD, added_cond_kwargs=added).sample
        other = FAMILY.predict(parts.unet, latents_BCHW, timesteps_B, condition, geometry(sizes[1], sizes[0]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - other).abs().max() > 1e-4  # sizes matter


def test_sizes_stay_exact_in_half_precision(parts: ModelParts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def unet(*_: Any, added_cond_kwargs: dict[str, torch.Tensor], **__: Any) -> tuple[torch.Tensor]:
        seen.append(added_cond_kwargs["time_ids"])
        return (torch.zeros(1),)

    condition = encode(parts, ["x"]).to(torch.device("cpu"), torch.bfloat16)
    latents_BCHW = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    FAMILY.predict(unet, latents_BCHW, torch.tensor([1]), condition, geometry((1367, 911, 3, 5, 64, 64)))  # type: ignore[arg-type]
    assert seen[0].tolist() == [[1367, 911, 3, 5, 64, 64]]


def test_sizes_are_needed(parts: ModelParts) -> None:
    with pytest.raises(ValueError, match="sizes"):
        FAMILY.predict(parts.unet, torch.zeros(1, 4, 8, 8), torch.tensor([1]), encode(parts, ["x"]))


# ---- a whole picture


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_picture_is_diffusers_own(parts: ModelParts, pipeline: Any, scale: float) -> None:
    prompt = PromptSpec("a photo of a cat", "blurry", 96, 64, seed=3, sample_steps=4, scale=scale)
    engine = Engine(FAMILY, parts, EngineSettings(make_schedule(), torch.device("cpu")))
    images_BCHW = engine.draw([sample_job(engine, prompt, "euler_a")])
    ours = (images_BCHW[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    plain: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline.scheduler = EulerAncestralDiscreteScheduler(**plain)
    theirs = pipeline(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        width=96,
        height=64,
        num_inference_steps=4,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    assert theirs.std() > 0.02  # not a flat picture, where all would be equal
    assert float(np.abs(ours - theirs).max()) < 1e-4


def test_names_and_constants(parts: ModelParts) -> None:
    assert FAMILY.base_model_version("epsilon") == "sdxl_base_v1-0"
    assert FAMILY.modelspec_architecture("v_prediction") == "stable-diffusion-xl-v1-base"
    assert (FAMILY.modelspec_resolution("epsilon"), FAMILY.latent_scale, FAMILY.bucket_step) == (1024, 0.13025, 32)
    assert FAMILY.default_sample_size(parts) == 64
