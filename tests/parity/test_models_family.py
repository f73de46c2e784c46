"""What a family refuses in one clear line, what it answers, and what network plug-ins see of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoint.io import TensorInfo, read_header, save_safetensors
from library.families import family_for
from library.families.base import ModelParts, TextSettings
from library.families.sd import text_encoder_view
from library.log import UserError
from library.models import build
from library.models.infer import family_of_keys, prediction_of_file, spec_of_file
from library.models.spec import SD1, SD2, TextEncoderSpec
from library.options import ModelOptions
from tests.toy import toy_spec, write_toy_checkpoint, write_toy_folder


def load(path: Path | str, **options: Any) -> ModelParts:
    chosen = ModelOptions(pretrained_model_name_or_path=str(path), **options)
    return family_for(chosen).load(chosen)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    return {
        "sd1": write_toy_checkpoint(place / "sd1.safetensors"),
        "sd2": write_toy_checkpoint(place / "sd2.safetensors", "sd2"),
        "sd1 v": write_toy_checkpoint(place / "v.safetensors", metadata={"modelspec.prediction_type": "v"}),
        "sd1 epsilon": write_toy_checkpoint(place / "e.safetensors", metadata={"modelspec.prediction_type": "epsilon"}),
        "sd2 v folder": write_toy_folder(place / "v", "sd2", prediction_type="v_prediction"),
    }


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sd1", {"v2": True}, "leave out --v2"),
        ("sd2", {}, "add --v2"),
        ("sd1 v", {}, "add --v_parameterization"),
        ("sd1 epsilon", {"v_parameterization": True}, "leave out --v_parameterization"),
        ("sd2 v folder", {"v2": True}, "add --v_parameterization"),
        ("sd2 v folder", {"v_parameterization": True}, "add --v2"),
    ],
)
def test_flags_that_do_not_fit_the_file(
    files: dict[str, Path], name: str, options: dict[str, bool], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(files[name], **options)
    assert str(files[name]) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "prediction"),
    [
        ("sd1", {}, "epsilon"),
        ("sd1", {"v_parameterization": True}, "v_prediction"),
        ("sd1 epsilon", {}, "epsilon"),
        ("sd2 v folder", {"v2": True, "v_parameterization": True}, "v_prediction"),
    ],
)
def test_prediction_type(files: dict[str, Path], name: str, options: dict[str, bool], prediction: str) -> None:
    parts = load(files[name], **options)
    assert parts.prediction_type == prediction
    assert parts.spec == toy_spec(parts.spec.family)


def test_link_to_a_file_is_followed(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    link = tmp_path / "sub" / "link"
    link.symlink_to(files["sd1"])
    parts = load(link)
    assert parts.source.name == "link"
    assert parts.source.path == files["sd1"].resolve()


@pytest.mark.parametrize("given", ["none.safetensors", "./none", "/none/model", "a/b/c", "models\\x"])
def test_missing_model_is_no_hub_id(given: str) -> None:
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: there is no file or folder"):
        load(given)


def test_model_must_be_named() -> None:
    with pytest.raises(UserError, match="--pretrained_model_name_or_path is needed"):
        family_for(ModelOptions()).load(ModelOptions())


def info(*shape: int) -> TensorInfo:
    return TensorInfo("F16", shape)


def test_sdxl_without_its_text_encoders_is_refused(tmp_path: Path) -> None:
    keys = {
        "model.diffusion_model.input_blocks.0.0.weight": info(320, 4, 3, 3),
        "conditioner.embedders.1.model.ln_final.weight": info(1280),
    }
    assert family_of_keys(keys) == "sdxl"
    with pytest.raises(UserError, match=r"^x has no first SDXL text encoder"):
        spec_of_file(keys, "x")
    write_toy_folder(tmp_path / "m")
    config = tmp_path / "m" / "unet" / "config.json"
    vector = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2816}
    config.write_text(json.dumps({**json.loads(config.read_text()), **vector}))
    with pytest.raises(UserError, match="is an SDXL model"):
        load(tmp_path / "m")


def test_lora_file_is_no_model(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "lora.safetensors", {"lora_unet_x.alpha": torch.tensor(1.0)})
    with pytest.raises(UserError, match="no whole Stable Diffusion model"):
        load(tmp_path / "lora.safetensors")


def test_inpainting_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files["sd1"])
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(state, tmp_path / "inpaint.safetensors")
    with pytest.raises(UserError, match="9 input channels"):
        load(tmp_path / "inpaint.safetensors")


@pytest.mark.parametrize("missing", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder"])
def test_folder_that_is_not_whole(tmp_path: Path, missing: str) -> None:
    folder = write_toy_folder(tmp_path / "m")
    place = folder / missing
    if place.is_dir():
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    else:
        place.unlink()
    with pytest.raises(UserError, match="whole"):
        load(folder)


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        ((), {}, None),
        (("v_pred",), {}, "v_prediction"),
        (("ztsnr",), {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction"),
        ((), {"modelspec.prediction_type": "Epsilon"}, "epsilon"),
        ((), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
    ],
)
def test_prediction_type_of_a_file(keys: tuple[str, ...], metadata: dict[str, str], expected: str | None) -> None:
    assert prediction_of_file({key: info(1) for key in keys}, metadata) == expected


def test_names_and_constants() -> None:
    sd1, sd2 = family_for(ModelOptions()), family_for(ModelOptions(v2=True))
    assert [f.base_model_version(p) for f in (sd1, sd2) for p in ("epsilon", "v_prediction")] == [
        "sd_v1",
        "sd_v1_v",
        "sd_v2",
        "sd_v2_v",
    ]
    assert [f.modelspec_architecture(p) for f in (sd1, sd2) for p in ("epsilon", "v_prediction")] == [
        "stable-diffusion-v1",
        "stable-diffusion-v1",
        "stable-diffusion-v2-512",
        "stable-diffusion-v2-768-v",
    ]
    assert [f.modelspec_resolution(p) for f in (sd1, sd2) for p in ("epsilon", "v_prediction")] == [512, 512, 512, 768]
    assert sd1.latent_scale == sd2.latent_scale == 0.18215
    assert (SD1.unet.sample_size * 8, SD2.unet.sample_size * 8) == (512, 512)


def test_sd2_pads_with_another_token_than_sd1() -> None:
    settings = TextSettings()
    rows = [family_for(ModelOptions(v2=v2)).tokenize(["cat"], settings).rows[0].ids_BNT[0, 0] for v2 in (False, True)]
    assert rows[0].tolist() == [49406, 2368, 49407, *[49407] * 74]
    assert rows[1].tolist() == [49406, 2368, 49407, *[0] * 74]


def test_plug_ins_see_a_text_model_level(files: dict[str, Path]) -> None:
    parts = load(files["sd1"])
    views = family_for(ModelOptions()).adapter_views(parts)
    assert views.unet is parts.unet
    (view,) = views.text_encoders
    names = {name for name, module in view.named_modules() if isinstance(module, torch.nn.Linear)}
    assert "text_model.encoder.layers.0.self_attn.q_proj" in names
    assert len(names) == 12
    assert {id(p) for p in view.parameters()} == {id(p) for p in parts.text_encoders[0].parameters()}
    assert (view.device, view.dtype) == (torch.device("cpu"), torch.float32)
    ids_BT = torch.tensor([[49406, 320, 49407]])
    assert torch.equal(view(ids_BT).last_hidden_state, parts.text_encoders[0](ids_BT).last_hidden_state)
    assert view.get_input_embeddings() is parts.text_encoders[0].get_input_embeddings()  # type: ignore[operator]


def test_an_encoder_with_the_level_is_its_own_view() -> None:
    encoder = build.empty_text_encoder(TextEncoderSpec(32, 64, 1, 2, "gelu", projection_width=32))
    assert text_encoder_view(encoder) is encoder
    assert "text_projection.weight" in build.shapes_of(encoder)
    assert "text_model.final_layer_norm.weight" in build.shapes_of(encoder)


def test_sd2_placeholders_are_named_in_the_metadata(files: dict[str, Path], tmp_path: Path) -> None:
    parts = load(files["sd2 v folder"], v2=True, v_parameterization=True)
    path = tmp_path / "from_folder.safetensors"
    family_for(ModelOptions(v2=True)).save_checkpoint(parts, path, None, {"a": "b"})
    assert set(read_header(path)[1]) == {"a", "sd_trainer.placeholders"}


def test_saving_a_folder_replaces_the_older_one_whole(files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale.txt").write_text("x")
    family_for(ModelOptions()).save_diffusers(load(files["sd1"]), target, torch.float16)
    assert not (target / "stale.txt").exists()
    assert {
        info.dtype for info in read_header(target / "unet" / "diffusion_pytorch_model.safetensors")[0].values()
    } == {"F16"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
