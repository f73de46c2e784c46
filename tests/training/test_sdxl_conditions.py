"""SDXL: the size condition through the loop, the VAE in half precision, defaults of the family, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.embeddings import Timesteps
from PIL import Image
from torch import nn

from library.diffusion.schedule import make_schedule
from library.families.base import ModelParts, ModelSource
from library.families.sdxl import SdxlFamily
from library.generation import engine
from library.generation.engine import Engine, EngineSettings
from library.generation.prompts import PromptSpec
from library.generation.sample import sample_job
from library.models import load
from library.models.spec import SDXL
from tests.cells_fixtures import Runner
from tests.training.runs import SDXL_SCRIPT, train, write_photos

UNET_ONLY = "--network_train_unet_only"
BF16 = ("--mixed_precision", "bf16")


@pytest.fixture
def fit(tmp_path, model_sdxl, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sdxl": model_sdxl}, photos, monkeypatch)


# ---- sizes


@pytest.fixture
def time_ids(monkeypatch) -> list[list[float]]:
    """The six numbers of each picture where the U-Net itself embeds them; they must arrive exact and stay so."""
    seen: list[list[float]] = []
    original = Timesteps.forward

    def forward(self, timesteps):
        embedded = original(self, timesteps)
        if timesteps.numel() == 6:  # the other call has one timestep for each picture
            assert timesteps.dtype == embedded.dtype == torch.float32
            seen.append(timesteps.tolist())
        return embedded

    monkeypatch.setattr(Timesteps, "forward", forward)
    return seen


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A picture that becomes 155 x 64 pixels, of which a bucket of 128 x 64 shows 13..141, mirrored 14..142."""
    return write_photos(tmp_path_factory.mktemp("wide"), [(242, 100)])


BUCKETS = ("--resolution", "96", "--enable_bucket", "--min_bucket_reso", "64")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--cache_latents",),
        ("--cache_latents_to_disk", *BF16),
        (*BF16, "--full_bf16", UNET_ONLY),
        (*BF16, "--network_module", "lycoris.kohya", "--network_args", "algo=locon"),
    ],
    ids=["pixels", "memory", "disk_bf16", "full_bf16", "autocast"],
)
def test_sizes_of_a_cropped_picture_reach_the_unet(fit, wide, time_ids, options):
    """Height first; a mirrored picture tells the crop of what is shown."""
    if "lycoris.kohya" in options:
        pytest.importorskip("lycoris")
    fit(*options, *BUCKETS, "--flip_aug", data=wide, steps=4)
    straight, mirrored = [100, 242, 0, 13, 64, 128], [100, 242, 0, 14, 64, 128]
    assert len(time_ids) == 4
    assert straight in time_ids
    assert mirrored in time_ids
    assert all(row in (straight, mirrored) for row in time_ids)


def test_sizes_without_buckets(fit, tmp_path, time_ids):
    """A tall picture is cropped at top and bottom, and its true size is told, not the cropped one."""
    fit(UNET_ONLY, data=write_photos(tmp_path / "tall", [(100, 203)]), steps=1)
    assert time_ids == [[203, 100, 33, 0, 64, 64]]  # 64 x 130 pixels


def test_a_random_crop_is_told(fit, wide, time_ids):
    fit(UNET_ONLY, *BUCKETS, "--random_crop", data=wide, steps=4)
    lefts = {row[3] for row in time_ids}
    assert len(lefts) > 2
    assert all(0 <= left <= 155 - 128 for left in lefts)
    assert {(*row[:3], *row[4:]) for row in time_ids} == {(100, 242, 0, 64, 128)}


def test_sizes_change_what_is_learned(fit, photos, monkeypatch):
    """The same pixels with other sizes give another loss: the condition is used, not only passed on."""
    true = fit(UNET_ONLY, steps=1).losses[0]
    original = SdxlFamily.predict

    def predict(self, unet, latents_BCHW, timesteps_B, condition, geometry, residuals=None):
        geometry.original_sizes_hw_B2.mul_(7)
        return original(self, unet, latents_BCHW, timesteps_B, condition, geometry, residuals)

    monkeypatch.setattr(SdxlFamily, "predict", predict)
    assert fit(UNET_ONLY, steps=1).losses[0] != pytest.approx(true, rel=1e-4)


# ---- the VAE in half precision


class VaeCalls:
    """Types in which the VAE is used; in half precision ``overflows`` makes all that it computes NaN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, overflows: bool = False) -> None:
        self.encoded: list[torch.dtype] = []
        self.decoded: list[torch.dtype] = []
        for name, seen in (("encode", self.encoded), ("decode", self.decoded)):
            monkeypatch.setattr(AutoencoderKL, name, self._noted(getattr(AutoencoderKL, name), seen, overflows))

    def _noted(self, original, seen, overflows):
        def call(vae, tensor_BCHW, *args, **more):
            assert tensor_BCHW.dtype == vae.dtype == next(vae.parameters()).dtype
            seen.append(vae.dtype)
            if overflows and vae.dtype != torch.float32:
                tensor_BCHW = tensor_BCHW * float("nan")
            return original(vae, tensor_BCHW, *args, **more)

        return call


@pytest.fixture
def preview(tmp_path) -> tuple[str, ...]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --s 2 --d 1\n")
    return "--sample_prompts", str(prompts), "--sample_every_n_steps", "1"


@pytest.mark.parametrize(
    ("options", "dtype"),
    [((), torch.bfloat16), (("--no_half_vae",), torch.float32), (("--no_half_vae", "--cache_latents"), torch.float32)],
    ids=["half", "whole", "whole_cached"],
)
def test_no_half_vae_keeps_the_vae_in_float32(fit, monkeypatch, preview, options, dtype):
    calls = VaeCalls(monkeypatch)
    fit(*BF16, UNET_ONLY, *preview, *options, steps=1)
    assert set(calls.encoded) == set(calls.decoded) == {dtype}


@pytest.mark.parametrize("cache", [(), ("--cache_latents",)], ids=["pixels", "cached"])
def test_a_vae_that_overflows_is_asked_again_in_float32(fit, monkeypatch, caplog, preview, cache):
    """Latents and pictures are as with ``--no_half_vae``; it is said, once, for which images."""
    options = (*BF16, UNET_ONLY, *preview, "--learning_rate", "1e-9", *cache)
    expected = fit(*options, "--no_half_vae", steps=1)
    calls = VaeCalls(monkeypatch, overflows=True)
    caplog.clear()
    done = fit(*options, steps=1)
    assert {torch.bfloat16, torch.float32} == set(calls.encoded) == set(calls.decoded)
    assert done.losses == pytest.approx(expected.losses, rel=1e-2)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert all("again in float32" in line and "photo" in line for line in said)
    assert len(said) == 1
    pictures = [sorted((run.file.parent / "sample").glob("*.png"))[0] for run in (expected, done)]
    first, second = (torch.tensor(list(Image.open(picture).tobytes())).float() for picture in pictures)
    assert first.std() > 5  # no black picture
    assert (first - second).abs().max() <= 4  # this VAE has weights of half precision


def test_latents_that_are_never_finite_stop_the_run(model_sdxl, photos, tmp_path, monkeypatch, capsys):
    original = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, images, *more: original(vae, images * float("nan"), *more))
    for cache in ((), ("--cache_latents",)):
        assert train(model_sdxl, photos, tmp_path, *BF16, UNET_ONLY, *cache, script=SDXL_SCRIPT) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "photo" in line
        assert "float32" in line
    assert not list(tmp_path.glob("*.safetensors"))


# ---- defaults


def test_a_preview_is_of_the_models_size_by_euler_a(fit, monkeypatch, tmp_path):
    """The toy's own size is 64; a prompt's sampler and size win."""
    names = []
    original = engine.make_sampler
    monkeypatch.setattr(engine, "make_sampler", lambda name, *more: names.append(name) or original(name, *more))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --s 2 --d 1\na thing --s 2 --d 2 --ss ddim --w 96\n")
    done = fit(UNET_ONLY, "--sample_prompts", str(prompts), "--sample_at_first", steps=1)
    pictures = sorted((done.file.parent / "sample").glob("*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(64, 64), (96, 64)] * 2  # before and at the end
    assert names == ["euler_a", "ddim"] * 2


def test_the_usual_picture_of_a_published_model_has_1024_pixels():
    nothing = nn.Identity()
    parts = ModelParts((), nothing, nothing, SDXL, "epsilon", ModelSource("x", Path("x")))  # type: ignore[arg-type]
    shared = sample_job(
        Engine(SdxlFamily(), parts, EngineSettings(make_schedule(), torch.device("cpu"))), PromptSpec("x"), "ddim"
    ).shared
    assert (shared.width, shared.height) == (1024, 1024)


def test_buckets_are_multiples_of_32(fit, wide):
    """By default, although nothing is said about the step."""
    done = fit(UNET_ONLY, *BUCKETS, data=wide, steps=1)
    assert '"resolution": [128, 64]' in done.metadata["ss_bucket_info"]


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bucket_reso_steps", "40", "--enable_bucket"), ("--bucket_reso_steps 40", "multiple of 32")),
        (("--v2",), ("--v2", "SDXL")),
        (("--weighted_captions",), ("--weighted_captions", "SDXL")),
        (("--full_bf16",), ("--full_bf16", "--mixed_precision bf16")),
        (("--fp8_base",), ("--fp8_base", "--mixed_precision")),
        (("--cache_latents", "--random_crop"), ("--random_crop", "--cache_latents")),
        (("--v_parameterization", "--v_pred_like_loss", "0.5"), ("--v_pred_like_loss", "--v_parameterization")),
        (("--text_encoder_lr", "1e-4", "1e-4", "1e-4"), ("--text_encoder_lr", "3 rates for 2 text encoders")),
        (("--network_args", "block_dims=" + ",".join("4" * 25)), ("block_dims", "19 values, has 25")),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else None,
)
def test_refusals(model_sdxl, photos, tmp_path, capsys, options, words):
    assert train(model_sdxl, photos, tmp_path, *options, script=SDXL_SCRIPT) == 1
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert all(word in line for word in words)
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*.safetensors"))


def test_bucket_steps_of_a_data_set_file_are_refused_before_the_model_is_read(
    model_sdxl, photos, tmp_path, capsys, monkeypatch
):
    read = []
    monkeypatch.setattr(load, "load_parts", lambda *args: read.append(args))
    file = tmp_path / "data.toml"
    file.write_text(
        "[[datasets]]\nresolution = 64\nenable_bucket = true\nbucket_reso_steps = 40\nmin_bucket_reso = 40\n"
        f'[[datasets.subsets]]\nimage_dir = "{photos / "1_sks thing"}"\n'
    )
    for option in ((), ("--dry_run",)):
        assert train(model_sdxl, photos, tmp_path, "--dataset_config", str(file), *option, script=SDXL_SCRIPT) == 1
        assert "bucket_reso_steps 40" in capsys.readouterr().err
    assert not read
