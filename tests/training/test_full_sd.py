"""Short whole runs of train_db.py and fine_tune.py on the toy models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fine_tune
import train_db
from library.families.sd import SdFamily
from library.options import ModelOptions
from library.options.script import parse
from library.training.script import Script
from tests.cells_fixtures import StepReports
from tests.training import runs
from tests.training.runs import SGD, metadata, state, tensors, write_photos

DB, FT = train_db.SCRIPT, fine_tune.SCRIPT
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
TEXT_MODEL = TEXT + "transformer.text_model."
# What SD2 files carry beside what is ever run.
NEVER_RUN = ("cond_stage_model.model.transformer.resblocks.2.", "cond_stage_model.model.text_projection")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> StepReports:
    return StepReports(monkeypatch)


def train(model: Path, data: Path, out: Path, *more: str, script: Script = DB) -> Path:
    """Run to the end; returns the saved file, if it is one."""
    assert runs.train(model, data, out, *more, script=script) == 0
    return out / "toy.safetensors"


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that are not bit for bit the same."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {key for key in old if not torch.equal(old[key], new[key])}


def norm(items: dict[str, Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in items.values()]).norm())


def assert_close(base: Path, one: Path, other: Path, limit: float = 1e-3) -> None:
    """Two models that went the same way from a base, by the length of the way."""
    start, left, right = tensors(base), tensors(one), tensors(other)
    way = norm({key: left[key] - start[key] for key in start})
    difference = norm({key: left[key] - right[key] for key in start})
    print(f"difference {difference:.3g} of a way of {way:.3g}")
    assert difference < limit * way


CELLS = {
    "db sd1": (DB, "sd1", (), (UNET, TEXT)),
    "db sd2 v without text": (
        DB,
        "sd2",
        ("--v_parameterization", "--stop_text_encoder_training", "-1", "--gradient_checkpointing"),
        (UNET,),
    ),
    "db sd1 clip skip": (
        DB,
        "sd1",
        ("--clip_skip", "2", "--weighted_captions", "--no_token_padding", "--train_batch_size", "2"),
        (UNET, TEXT_MODEL + "embeddings", TEXT_MODEL + "encoder.layers.0", TEXT_MODEL + "final_layer_norm"),
    ),
    "ft sd1 bf16": (FT, "sd1", ("--mixed_precision", "bf16", "--loss_type", "huber", "--fused_backward_pass"), (UNET,)),
    "ft sd2 text alone": (
        FT,
        "sd2",
        ("--train_text_encoder", "--learning_rate", "0", "--learning_rate_te", "1e-3", "--min_snr_gamma", "5"),
        (TEXT,),
    ),
}


@pytest.mark.parametrize(("script", "family", "more", "learns"), CELLS.values(), ids=list(CELLS))
def test_what_may_change_changes_and_nothing_else(
    script: Script,
    family: str,
    more: tuple[str, ...],
    learns: tuple[str, ...],
    model: Path,
    model_sd2: Path,
    photos: Path,
    tmp_path: Path,
    reports: StepReports,
) -> None:
    base = model_sd2 if family == "sd2" else model
    more = (*more, "--max_train_steps", "3", *(("--v2",) if family == "sd2" else ()))
    saved = train(base, photos, tmp_path, *more, script=script)
    reports.check(3)
    may = {key for key in tensors(base) if key.startswith(learns) and not key.startswith(NEVER_RUN)}
    may = {key for key in may if not key.endswith(("logit_scale", "position_ids"))}
    moved = changed(base, saved)
    assert moved <= may, sorted(moved - may)[:5]
    assert len(moved) > 0.95 * len(may), sorted(may - moved)
    for prefix in learns:
        assert any(key.startswith(prefix) for key in moved), prefix
    said = metadata(saved)
    version = {"sd1": "sd_v1", "sd2": "sd_v2"}[family] + ("_v" if "--v_parameterization" in more else "")
    assert said["ss_base_model_version"] == version
    assert "ss_network_module" not in said
    assert said["modelspec.architecture"].startswith("stable-diffusion-v")


def test_an_overfit_set_is_learned(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The held-out photo is a copy of the one that is trained on, so its loss at fixed noise is the training's own."""
    photos = write_photos(tmp_path / "photos", [(64, 64)])
    place = photos / "1_sks thing"
    for name in ("photo0.png", "photo0.caption"):
        (place / name.replace("photo0", "copy")).write_bytes((place / name).read_bytes())
    more = ("--validation_split", "0.5", "--validate_every_n_steps", "12", "--max_train_steps", "12")
    train(model, photos, tmp_path / "out", *more)
    (line,) = [record.message for record in caplog.records if record.message.startswith("validation loss")]
    first, last = (float(part.split()[2 if index == 0 else 0]) for index, part in enumerate(line.split(", ")[:2]))
    print(line)
    assert last < 0.75 * first


def test_text_stops_learning_and_a_resumed_run_knows(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    more = ("--stop_text_encoder_training", "2", "--save_state", "--save_every_n_steps", "1", "--ema_decay", "0.5")
    whole = train(model, photos, tmp_path / "a", *more)
    said = [record.message for record in caplog.records if "learns no more" in record.message]
    assert said == ["from step 2 on the text encoder learns no more"]
    after = [tmp_path / "a" / f"toy-step{step:08d}.safetensors" for step in range(1, 5)]
    assert any(key.startswith(TEXT) for key in changed(after[0], after[1]))
    for one, other in ((after[1], after[2]), (after[2], after[3])):
        moved = changed(one, other)
        assert moved
        assert all(key.startswith(UNET) for key in moved)
    for step in (1, 3):  # before and after the stop
        resume = tmp_path / "a" / f"toy-step{step:08d}-state"
        assert state(resume)["step"] == step
        again = train(model, photos, tmp_path / f"b{step}", *more, "--resume", str(resume))
        for name in ("toy.safetensors", "toy-ema.safetensors"):
            assert (again.parent / name).read_bytes() == (whole.parent / name).read_bytes(), (step, name)


def test_accumulation_and_processes_equal_the_big_batch(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the text encoder gets no gradient any more, for the average, and for the validation loss."""
    photos = write_photos(tmp_path / "photos", [(64, 64)] * 7)
    shared = (*SGD, "--learning_rate", "0.01", "--stop_text_encoder_training", "1", "--max_train_steps", "2")
    shared += ("--cache_latents_to_disk", "--ema_decay", "0.9", "--validation_split", "0.4")
    one = train(model, photos, tmp_path / "one", "--train_batch_size", "2", *shared)
    said = [record.message for record in caplog.records if "loss/validation" in record.message]
    parts = train(model, photos, tmp_path / "parts", "--gradient_accumulation_steps", "2", *shared)
    done = runs.launch_two("train_db.py", runs.command(model, photos, tmp_path / "two", *shared, script=DB))
    assert done.returncode == 0, done.stderr[-3000:]
    for other in (parts, tmp_path / "two" / "toy.safetensors"):
        assert_close(model, one, other)
        assert_close(model, one.with_name("toy-ema.safetensors"), other.with_name("toy-ema.safetensors"))
    theirs = [line for line in done.stderr.splitlines() if "loss/validation" in line]
    assert len(theirs) == len(said) == 2
    for ours, line in zip(said, theirs, strict=True):
        assert float(line.rsplit(maxsplit=1)[1]) == pytest.approx(float(ours.rsplit(maxsplit=1)[1]), abs=2e-4)


@pytest.mark.parametrize("script", [DB, FT], ids=["db", "ft"])
def test_image_weights_count(script: Script, model: Path, tmp_path: Path) -> None:
    """One step of SGD is linear in the weight of a regularisation image: the reference forgot it in fine_tune.py."""
    photos = write_photos(tmp_path / "photos", [(64, 64)])
    others = write_photos(tmp_path / "others", [(64, 64)], seed=5)
    more = (*SGD, "--reg_data_dir", str(others), "--max_train_steps", "1", "--train_batch_size", "2")
    more += ("--learning_rate_te", "0")
    saved = {
        weight: tensors(train(model, photos, tmp_path / weight, *more, "--prior_loss_weight", weight, script=script))
        for weight in ("0", "0.5", "1")
    }
    between = {key: (saved["0"][key] + saved["1"][key]) / 2 for key in saved["0"]}
    apart = norm({key: saved["0"][key] - saved["1"][key] for key in between})
    assert apart > 0
    assert norm({key: saved["0.5"][key] - between[key] for key in between}) < 1e-3 * apart


# ---- forms of files


def test_all_forms_hold_the_same_model(model: Path, photos: Path, tmp_path: Path) -> None:
    one_step = ("--max_train_steps", "1")
    forms = {"safetensors": "toy.safetensors", "ckpt": "toy.ckpt", "diffusers_safetensors": "toy"}
    loaded = {}
    for form, name in forms.items():
        train(model, photos, tmp_path / form, *one_step, "--save_model_as", form)
        path = tmp_path / form / name
        parts = SdFamily().load(ModelOptions(pretrained_model_name_or_path=str(path)))
        loaded[form] = {f"{n}.{k}": t for n, module in parts.by_name().items() for k, t in module.state_dict().items()}
    first = loaded["safetensors"]
    for other in loaded.values():
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first)
    counters = torch.load(tmp_path / "ckpt" / "toy.ckpt", weights_only=True)
    assert (counters["epoch"], counters["global_step"]) == (1, 1)
    # the form of the base model is kept, and a folder trains what the file trains
    bases = {"ckpt": "toy.ckpt", "diffusers_safetensors": "toy"}
    for form, name in bases.items():
        train(tmp_path / form / name, photos, tmp_path / "next", *one_step, "--output_name", form)
    folder = tensors(tmp_path / "next" / "diffusers_safetensors" / "unet" / "diffusion_pytorch_model.safetensors")
    single = SdFamily().load(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "next" / "ckpt.ckpt")))
    assert all(torch.equal(tensor, folder[key]) for key, tensor in single.unet.state_dict().items())


PROMPT, NEGATIVE, SEED, STEPS, SCALE = "a sks thing on a table", "blurry, dark", 11, 4, 5.0


@pytest.mark.parametrize("average", [False, True], ids=["weights", "average"])
def test_a_diffusers_pipeline_draws_our_preview(average: bool, model_sd2: Path, photos: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT} --n {NEGATIVE} --w 64 --h 64 --d {SEED} --s {STEPS} --l {SCALE}")
    more = ("--v2", "--v_parameterization", "--max_train_steps", "2", "--save_model_as", "diffusers")
    more += ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--ema_decay", "0.6")
    train(model_sd2, photos, tmp_path, *more, *(("--sample_with_ema",) if average else ()))
    (picture,) = (tmp_path / "sample").glob("*.png")
    ours = np.asarray(Image.open(picture)).astype(float)

    def distance(folder: str) -> float:
        """Largest difference of the preview and the picture of a saved model, of 255."""
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        # previews end without noise, as the reference's do; the models' own configurations end at the first timestep
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, set_alpha_to_one=True)
        made = pipe(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="np",
        )
        return float(np.abs(ours - (made.images[0] * 255).round()).max())

    drawn, other = ("toy-ema", "toy") if average else ("toy", "toy-ema")
    found = distance(drawn), distance(other)
    print(f"largest difference {found[0]:.0f} of 255, with the other weights {found[1]:.0f}")
    assert found[0] <= 1
    assert found[1] > 3


def test_fine_tuning_on_a_metadata_file(model: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", [(64, 64), (80, 64)]) / "1_sks thing"
    table = {str(photos / f"photo{i}.png"): {"caption": f"thing {i}", "tags": "sks, table"} for i in range(2)}
    (tmp_path / "meta.json").write_text(json.dumps(table))
    more = ("--in_json", str(tmp_path / "meta.json"), "--dataset_repeats", "2", "--max_train_epochs", "1")
    more += ("--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16", "--full_bf16")
    saved = train(model, photos, tmp_path / "out", *more, "--mixed_precision", "bf16", script=FT)
    assert metadata(saved)["ss_steps"] == "4"
    assert {key.split(".")[0] for key in changed(model, saved)} >= {"model"}


def test_options_that_say_nothing_are_named() -> None:
    needed = "--pretrained_model_name_or_path m --output_dir o --train_data_dir d --resolution 64"
    warnings = parse(FT.options, [*needed.split(), "--learning_rate_te", "1e-4"]).warnings
    assert any("--learning_rate_te has no effect without --train_text_encoder" in line for line in warnings)
    assert parse(DB.options, [*needed.split(), "--learning_rate_te", "1e-4"]).warnings == ()
