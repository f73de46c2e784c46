"""What a run writes, read by others: Diffusers draws our preview, headers and hashes are what other programs expect."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.text.tokenizer import clip_tokenizer
from tests.cells_fixtures import Runner
from tests.toy import toy_modules
from tests.training.runs import metadata, tensors, train

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/data/lora_sd1_metadata.json").read_text())
PROMPT, NEGATIVE, SEED, SAMPLE_STEPS, SCALE = "a sks thing on a table", "blurry, dark", 11, 4, 5.0
# Written only with --dataset_config, for each data set and for each of its subsets.
DATASET_FIELDS = {
    "is_dreambooth", "batch_size_per_device", "num_train_images", "num_reg_images", "resolution", "enable_bucket",
    "min_bucket_reso", "max_bucket_reso", "tag_frequency", "bucket_info", "subsets",
}  # fmt: skip
SUBSET_FIELDS = {
    "img_count", "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens",
    "keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix", "image_dir",
    "class_tokens", "is_reg",
}  # fmt: skip
# What a run on the command line's own data set has no place for in the other form.
FOLDER_ONLY = {
    "ss_batch_size_per_device", "ss_total_batch_size", "ss_resolution", "ss_color_aug", "ss_flip_aug",
    "ss_random_crop", "ss_shuffle_caption", "ss_enable_bucket", "ss_bucket_no_upscale", "ss_min_bucket_reso",
    "ss_max_bucket_reso", "ss_keep_tokens", "ss_reg_dataset_dirs", "ss_bucket_info",
}  # fmt: skip
VAE_KEYS = {"ss_vae_name", "ss_vae_hash", "ss_new_vae_hash"}
MINIMAL = {
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
}  # fmt: skip


@pytest.fixture
def fit(tmp_path, model, model_sd2, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sd1": model, "sd2": model_sd2}, photos, monkeypatch)


# ---- Diffusers


def draw_with_diffusers(family: str, lora: Path | None) -> np.ndarray:
    """The preview's picture by Diffusers alone, on the same base model: (64, 64, 3) of 0..255."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    modules = toy_modules(family)
    pipe = StableDiffusionPipeline(
        vae=modules["vae"],
        text_encoder=modules["text_encoder"],
        tokenizer=clip_tokenizer(0 if family == "sd2" else 49407),
        unet=modules["unet"],
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction" if family == "sd2" else "epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    generator = torch.Generator("cpu").manual_seed(SEED)
    picture = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=64,
        width=64,
        num_inference_steps=SAMPLE_STEPS,
        guidance_scale=SCALE,
        generator=generator,
        output_type="np",
    ).images[0]
    return (picture * 255).round()


@pytest.mark.parametrize(
    ("family", "options"),
    [("sd1", ()), ("sd1", ("--network_args", "conv_dim=2", "conv_alpha=2")), ("sd2", ("--v_parameterization",))],
    ids=["sd1", "c3lier", "sd2"],
)
def test_diffusers_draws_the_same_picture(fit, tmp_path, family, options):
    pytest.importorskip("peft")
    prompts = tmp_path / "prompts.txt"
    line = f"{PROMPT} --n {NEGATIVE} --w 64 --h 64 --d {SEED} --s {SAMPLE_STEPS} --l {SCALE}"
    prompts.write_text(line)
    preview = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "3")
    done = fit(*options, *preview, "--learning_rate", "3e-2", "--network_alpha", "4", family=family)
    (picture,) = (done.file.parent / "sample").glob("*.png")
    ours = np.asarray(Image.open(picture)).astype(float)
    theirs, base = draw_with_diffusers(family, done.file), draw_with_diffusers(family, None)
    error = np.abs(ours - theirs).max()
    effect = np.abs(theirs - base).mean()
    print(f"{family}: largest difference {error:.0f} of 255; the LoRA changes {effect:.1f} on average")
    assert effect > 5
    assert error <= 1


# ---- metadata


def test_header_of_a_folder_run(fit, model):
    done = fit("--vae", str(model), "--network_args", "conv_dim=2", "--clip_skip", "2", "--min_timestep", "10")
    found = done.metadata
    assert GOLDEN.keys() - found.keys() == set()
    assert VAE_KEYS | {"ss_network_args", "modelspec.timestep_range", "modelspec.encoder_layer"} <= found.keys()
    assert found["ss_vae_name"] == found["ss_sd_model_name"] == "toy.safetensors"
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert json.loads(found["ss_tag_frequency"])["1_sks thing"]["a sks thing"] == 4
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2"}
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert str(model.parent) not in json.dumps(found)


def test_header_of_a_run_from_a_data_set_file(fit, photos, tmp_path):
    config = tmp_path / "data.toml"
    folder = photos / "1_sks thing"
    config.write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder}"\n')
    found = fit("--dataset_config", str(config), steps=1).metadata
    assert GOLDEN.keys() - FOLDER_ONLY - found.keys() == set()
    assert FOLDER_ONLY.isdisjoint(found)
    (dataset,) = json.loads(found["ss_datasets"])
    assert dataset.keys() >= DATASET_FIELDS
    (subset,) = dataset["subsets"]
    assert subset.keys() >= SUBSET_FIELDS
    assert subset["image_dir"] == "1_sks thing"


def test_little_is_said_with_no_metadata(fit):
    found = fit("--no_metadata", "--network_args", "conv_dim=2", steps=1).metadata
    kept = {key for key in found if key.startswith("ss_")}
    assert kept == MINIMAL
    assert {"sshs_model_hash", "sshs_legacy_hash", "modelspec.architecture"} <= found.keys()


def test_saves_of_one_run_tell_their_own_step(fit):
    done = fit("--save_every_n_steps", "2", "--save_every_n_epochs", "1", steps=6)
    folder = done.file.parent
    rows = {path.stem: metadata(path) for path in folder.glob("*.safetensors")}
    moments = {name: (row["ss_steps"], row["ss_epoch"]) for name, row in rows.items()}
    assert moments == {
        "toy-step00000002": ("2", "0"),
        "toy-step00000004": ("4", "0"),
        "toy-000001": ("4", "1"),
        "toy-step00000006": ("6", "1"),
        "toy": ("6", "2"),
    }
    assert len({row["ss_session_id"] for row in rows.values()}) == 1
    assert len({row["sshs_model_hash"] for row in rows.values()}) == 3  # the same weights, the same hash


@pytest.mark.parametrize("options", [("--network_dim", "32"), ("--save_precision", "bf16")], ids=["large", "small"])
def test_hashes_are_those_of_the_bytes_on_disk(fit, options):
    """The data part has a hash of its own; the short one looks at 64 KiB from 1 MiB on (nothing, in a small file)."""
    done = fit(*options, steps=1)
    data = done.file.read_bytes()
    assert (len(data) > 0x100000) == ("--network_dim" in options)
    (header_length,) = struct.unpack("<Q", data[:8])
    assert done.metadata["sshs_model_hash"] == hashlib.sha256(data[8 + header_length :]).hexdigest()
    window = data[0x100000 : 0x100000 + 0x10000]
    assert done.metadata["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


# ---- other formats, uploads


def test_pickles_hold_the_same_tensors(fit):
    """ckpt and pt are plain dictionaries, opened without running code; and they serve as --network_weights."""
    plain = fit(steps=1).tensors
    for kind in ("ckpt", "pt"):
        done = fit("--save_model_as", kind, "--save_precision", "float", steps=1, suffix=kind)
        loaded = torch.load(done.file, weights_only=True)
        assert loaded.keys() == plain.keys()
        assert all(torch.equal(loaded[key], plain[key]) for key in plain)
        again = fit("--network_weights", str(done.file), "--learning_rate", "1e-9", steps=1).tensors
        assert all(torch.allclose(again[key], plain[key], atol=1e-6) for key in plain)


def test_all_saves_are_uploaded(model, photos, tmp_path, monkeypatch):
    from library.training import output

    sent: list[tuple[str, bool]] = []
    closed: list[bool] = []

    class FakeUploader:
        def __init__(self, options):
            assert options.huggingface_repo_id == "me/loras"
            assert options.huggingface_token == "hf_secret"

        def check(self):
            assert not sent

        def upload(self, path, *, wait=False):
            assert path.exists()
            sent.append((path.name, wait))

        def close(self):
            closed.append(True)

    monkeypatch.setattr(output, "Uploader", FakeUploader)
    hub = ("--huggingface_repo_id", "me/loras", "--huggingface_token", "hf_secret", "--save_every_n_steps", "2")
    states = ("--save_state", "--save_state_to_huggingface")
    assert train(model, photos, tmp_path / "a", *hub, *states) == 0
    names = ["toy-step00000002.safetensors", "toy-step00000002-state"]
    assert [name for name, _ in sent[:2]] == names
    assert {("toy.safetensors", True)} <= set(sent)
    assert closed == [True]
    text = (
        json.dumps(metadata(tmp_path / "a" / "toy.safetensors"))
        + (tmp_path / "a" / names[1] / "state.json").read_text()
    )
    assert "hf_secret" not in text
    sent.clear()
    assert train(model, photos, tmp_path / "b", *hub, "--save_state") == 0
    assert ("toy.safetensors", True) in sent
    assert not any("state" in name for name, _ in sent)
    assert tensors(tmp_path / "a" / "toy.safetensors").keys() == tensors(tmp_path / "b" / "toy.safetensors").keys()
