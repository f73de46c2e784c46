"""Short whole runs of sdxl_train.py on the toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoint.sdxl_keys import parameter_blocks
from library.options.scripts import SDXL_TRAIN
from library.training.kinds.full import FullTraining
from library.training.script import Script
from tests.toy import toy_modules, toy_spec, write_toy_checkpoint, write_toy_folder
from tests.training import runs
from tests.training.runs import metadata, state, tensors, write_photos

SCRIPT = Script(SDXL_TRAIN, kind="library.training.kinds.full:FullTraining", tracker_name="finetuning")
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128")
UNET, TE1, TE2, VAE = (
    "model.diffusion_model.",
    "conditioner.embedders.0.",
    "conditioner.embedders.1.",
    "first_stage_model.",
)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("sdxl") / "toy.safetensors", "sdxl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("pictures"), [(64, 64), (130, 70), (70, 130), (200, 190)])


def train(model: Path, data: Path, out: Path, *more: str) -> int:
    return runs.train(model, data, out, *BUCKETS, *more, script=SCRIPT)


def moved(before: Path, after: Path) -> dict[str, float]:
    """How far each tensor went, by name."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {key: float((new[key].float() - old[key].float()).abs().max()) if old[key].numel() else 0.0 for key in old}


def test_unet_alone_by_default(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    assert train(sdxl, pictures, tmp_path) == 0
    changes = moved(sdxl, tmp_path / "toy.safetensors")
    assert {key for key, change in changes.items() if change} == {key for key in changes if key.startswith(UNET)}
    said = metadata(tmp_path / "toy.safetensors")
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["ss_steps"] == "4"
    assert "ss_network_module" not in said


def test_each_text_encoder_has_its_own_rate(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    """With AdamW the first step is as long as the rate, so the rates can be read from the weights."""
    more = ("--train_text_encoder", "--learning_rate", "1e-4", "--learning_rate_te1", "1e-3")
    more += ("--learning_rate_te2", "1e-2", "--max_train_steps", "1", "--optimizer_args", "weight_decay=0")
    assert train(sdxl, pictures, tmp_path, *more) == 0
    changes = moved(sdxl, tmp_path / "toy.safetensors")
    for prefix, rate in ((UNET, 1e-4), (TE1, 1e-3), (TE2, 1e-2)):
        longest = max(change for key, change in changes.items() if key.startswith(prefix))
        assert longest == pytest.approx(rate, rel=0.02), prefix
    assert not any(change for key, change in changes.items() if key.startswith(VAE))


def test_rate_0_freezes_an_encoder_and_layers_out_of_reach_stay(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    more = ("--train_text_encoder", "--learning_rate_te2", "0", "--learning_rate", "1e-3")
    assert train(sdxl, pictures, tmp_path, *more) == 0
    changes = moved(sdxl, tmp_path / "toy.safetensors")
    assert not any(change for key, change in changes.items() if key.startswith(TE2))
    last = toy_spec("sdxl").text_encoders[0].layers - 1
    beyond = (f".encoder.layers.{last}.", ".final_layer_norm.")
    first = {key: change for key, change in changes.items() if key.startswith(TE1) and not key.endswith("position_ids")}
    for key, change in first.items():
        assert bool(change) != any(part in key for part in beyond), key


def test_text_encoders_alone(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    more = (
        "--train_text_encoder",
        "--learning_rate",
        "0",
        "--learning_rate_te1",
        "1e-3",
        "--learning_rate_te2",
        "1e-3",
    )
    assert train(sdxl, pictures, tmp_path, *more) == 0
    changes = moved(sdxl, tmp_path / "toy.safetensors")
    assert not any(change for key, change in changes.items() if key.startswith(UNET))
    assert any(change for key, change in changes.items() if key.startswith(TE2))


def test_rates_by_block(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    rates = [1e-3 if block in (0, 5, 11, 22) else 0.0 for block in range(23)]
    more = ("--block_lr", ",".join(map(str, rates)), "--logging_dir", str(tmp_path / "logs"))
    assert train(sdxl, pictures, tmp_path, *more) == 0
    changes = moved(sdxl, tmp_path / "toy.safetensors")
    blocks = ("time_embed.", "label_emb.", "input_blocks.4.", "middle_block.1.", "out.")
    wanted = tuple(UNET + block for block in blocks)
    for key, change in changes.items():
        assert bool(change) == key.startswith(wanted), key


def test_blocks_cover_the_unet() -> None:
    blocks = parameter_blocks(toy_spec("sdxl"))
    names = set(dict(toy_modules("sdxl")["unet"].named_parameters()))
    assert set(blocks) == names
    assert set(blocks.values()) == set(range(23))
    assert blocks["time_embedding.linear_1.weight"] == blocks["add_embedding.linear_1.weight"] == 0
    assert (blocks["conv_in.weight"], blocks["down_blocks.0.resnets.0.conv1.weight"]) == (1, 2)
    assert (blocks["mid_block.resnets.0.conv1.weight"], blocks["mid_block.resnets.1.conv1.weight"]) == (10, 12)
    assert (blocks["up_blocks.0.resnets.0.conv1.weight"], blocks["up_blocks.2.resnets.2.conv1.weight"]) == (13, 21)
    assert blocks["conv_norm_out.weight"] == blocks["conv_out.bias"] == 22


@pytest.mark.parametrize("optimizer", ["AdamW", "AdaFactor", "Muon"])
def test_fused_backward_pass_gives_the_same_model(sdxl: Path, pictures: Path, tmp_path: Path, optimizer: str) -> None:
    more = ("--optimizer_type", optimizer, "--max_grad_norm", "0", "--gradient_checkpointing", "--train_text_encoder")
    more += ("--optimizer_args", "relative_step=False") if optimizer == "AdaFactor" else ()
    assert train(sdxl, pictures, tmp_path / "a", *more) == 0
    assert train(sdxl, pictures, tmp_path / "b", *more, "--fused_backward_pass") == 0
    plain, fused = tensors(tmp_path / "a" / "toy.safetensors"), tensors(tmp_path / "b" / "toy.safetensors")
    base = tensors(sdxl)
    length = _norm({key: plain[key] - base[key] for key in base})
    difference = _norm({key: plain[key] - fused[key] for key in base})
    print(f"{optimizer}: difference {difference:.3g} of a way of {length:.3g}")
    assert difference < 1e-3 * length


def _norm(items: dict[str, Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in items.values()]).norm())


def test_full_bf16_and_the_other_forms(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    more = ("--full_bf16", "--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", "2")
    assert train(sdxl, pictures, tmp_path, *more, "--save_model_as", "diffusers") == 0
    folder = tmp_path / "toy"
    assert {tensor.dtype for tensor in tensors(folder / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.bfloat16
    }
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert pipeline.unet.config.cross_attention_dim == toy_spec("sdxl").unet.context_width
    # a folder as the base gives a folder, a second round trains what the first left
    assert train(folder, pictures, tmp_path / "again", *more, "--output_name", "next") == 0
    assert (tmp_path / "again" / "next" / "model_index.json").is_file()


def test_ckpt_holds_counters_and_is_read_again(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    assert train(sdxl, pictures, tmp_path, "--save_model_as", "ckpt", "--save_precision", "fp16") == 0
    content = torch.load(tmp_path / "toy.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (1, 4)
    floats = [tensor for tensor in content["state_dict"].values() if tensor.is_floating_point() and tensor.numel()]
    assert {tensor.dtype for tensor in floats} == {torch.float16}
    more = ("--max_train_steps", "1")
    assert train(tmp_path / "toy.ckpt", pictures, tmp_path / "b", *more) == 0
    assert (tmp_path / "b" / "toy.ckpt").is_file()
    assert train(tmp_path / "toy.ckpt", pictures, tmp_path / "c", *more, "--use_safetensors") == 0
    assert (tmp_path / "c" / "toy.safetensors").is_file()


def test_bf16_keeps_masters_in_float32(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    """A change of 1e-6 is lost in bf16 weights; float32 masters, loaded as float32, keep it."""
    more = ("--mixed_precision", "bf16", "--learning_rate", "1e-6", "--max_train_steps", "1")
    assert train(sdxl, pictures, tmp_path, *more) == 0
    changes = [change for key, change in moved(sdxl, tmp_path / "toy.safetensors").items() if key.startswith(UNET)]
    assert 0 < max(changes) < 3e-6
    assert sum(change > 0 for change in changes) > 0.9 * len(changes)
    # what is frozen was computed with in bf16, and is saved as it was
    base, saved = tensors(sdxl), tensors(tmp_path / "toy.safetensors")
    assert all(torch.equal(base[key], saved[key]) for key in base if not key.startswith(UNET))


def test_a_base_model_that_vanished_costs_nothing(
    sdxl: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(sdxl.read_bytes())
    learn = FullTraining.on_epoch_start
    monkeypatch.setattr(FullTraining, "on_epoch_start", lambda self: (base.unlink(missing_ok=True), learn(self)))
    more = ("--mixed_precision", "bf16", "--max_train_steps", "1")
    assert train(base, pictures, tmp_path / "out", *more) == 0
    assert "saved as they are in memory" in caplog.text
    assert set(tensors(tmp_path / "out" / "toy.safetensors")) == set(tensors(sdxl))


def test_velocity_is_what_a_v_model_learns(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    plain = ("--max_train_steps", "1", "--learning_rate", "1e-4")
    assert train(sdxl, pictures, tmp_path / "e", *plain) == 0
    assert train(sdxl, pictures, tmp_path / "v", *plain, "--v_parameterization", "--zero_terminal_snr") == 0
    noise, velocity = tensors(tmp_path / "e" / "toy.safetensors"), tensors(tmp_path / "v" / "toy.safetensors")
    assert set(velocity) - set(noise) == {"v_pred", "ztsnr"}
    assert any(not torch.equal(noise[key], velocity[key]) for key in noise)
    assert metadata(tmp_path / "v" / "toy.safetensors")["modelspec.prediction_type"] == "v"
    # the saved file says what it predicts: training it as a noise model is refused
    assert train(tmp_path / "v" / "toy.safetensors", pictures, tmp_path / "w", *plain) == 1


def test_resume_equals_an_unbroken_run(
    sdxl: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    more = ("--fused_backward_pass", "--train_text_encoder", "--lr_scheduler", "cosine", "--save_state")
    more += ("--save_every_n_steps", "2")
    assert train(sdxl, pictures, tmp_path / "a", *more) == 0
    middle = tmp_path / "a" / "toy-step00000002-state"
    assert state(middle)["step"] == 2
    assert train(sdxl, pictures, tmp_path / "b", *more, "--resume", str(middle)) == 0
    assert (tmp_path / "a" / "toy.safetensors").read_bytes() == (tmp_path / "b" / "toy.safetensors").read_bytes()


def test_image_weights_count(sdxl: Path, tmp_path: Path) -> None:
    """Regularisation images with weight 0 leave only the others' gradient: the reference forgot the weights here."""
    photos = write_photos(tmp_path / "photos", [(64, 64)])
    others = write_photos(tmp_path / "others", [(64, 64)], seed=5)
    more = ("--reg_data_dir", str(others), "--max_train_steps", "2", "--learning_rate", "1e-3")
    assert train(sdxl, photos, tmp_path / "a", *more, "--prior_loss_weight", "0") == 0
    assert train(sdxl, photos, tmp_path / "b", *more, "--prior_loss_weight", "1") == 0
    first, second = tensors(tmp_path / "a" / "toy.safetensors"), tensors(tmp_path / "b" / "toy.safetensors")
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_metadata_data_sets(sdxl: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", [(64, 64), (130, 70)]) / "1_sks thing"
    table = {str(photos / f"photo{i}.png"): {"caption": f"thing {i}"} for i in range(2)}
    (tmp_path / "meta.json").write_text(json.dumps(table))
    assert train(sdxl, photos, tmp_path / "out", "--in_json", str(tmp_path / "meta.json"), "--cache_latents") == 0


REFUSED = [
    (("--block_lr", "1e-4,1e-4"), "must be 23 numbers of 0 or more, separated by commas, not 2"),
    ((f"--block_lr={','.join(['-1'] * 23)}",), "must be 23 numbers of 0 or more"),
    (("--learning_rate", "0"), "nothing to train"),
    (("--block_lr", ",".join(["0"] * 23)), "nothing to train"),
    (("--learning_rate", "0", "--block_lr", ",".join(["1"] * 23)), "which freezes the U-Net"),
    (("--fused_backward_pass", "--gradient_accumulation_steps", "2"), "larger --train_batch_size"),
    (("--fused_backward_pass", "--mixed_precision", "fp16"), "does not go with --mixed_precision fp16"),
    (("--fused_backward_pass", "--optimizer_type", "Prodigy"), "Prodigy looks at all weights together"),
    (("--optimizer_type", "LBFGS"), "no step can be made with gradients alone"),
    (("--optimizer_type", "SparseAdam"), "SparseAdam does not support dense gradients"),
    (("--fp8_base", "--mixed_precision", "bf16"), "float8 weights cannot learn"),
    (("--full_bf16",), "--full_bf16 needs --mixed_precision bf16"),
    (("--save_model_as", "pt"), "must be one of ckpt, safetensors, diffusers"),
]


@pytest.mark.parametrize(
    ("more", "said"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_refusals(
    more: tuple[str, ...], said: str, sdxl: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(sdxl, pictures, tmp_path, *more) == 1
    assert said in capsys.readouterr().err


def test_a_folder_base_model_is_named_in_the_plan(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_toy_folder(tmp_path / "model", "sdxl")
    assert train(folder, pictures, tmp_path / "out", "--dry_run", "--train_text_encoder") == 0
    said = capsys.readouterr().out
    assert "text_encoder1" in said
    assert "text_encoder2" in said


SGD = ("--optimizer_type", "SGD", "--learning_rate", "0.01", "--max_grad_norm", "0", "--max_train_steps", "2")


def test_accumulation_and_processes_equal_the_big_batch(sdxl: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", [(64, 64)] * 4)
    shared = ("--train_text_encoder", "--cache_latents_to_disk", *SGD)
    assert train(sdxl, photos, tmp_path / "one", "--train_batch_size", "2", *shared) == 0
    assert train(sdxl, photos, tmp_path / "parts", "--gradient_accumulation_steps", "2", *shared) == 0
    arguments = runs.command(sdxl, photos, tmp_path / "two", *BUCKETS, *shared, script=SCRIPT)
    done = runs.launch_two("sdxl_train.py", arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    base, one = tensors(sdxl), tensors(tmp_path / "one" / "toy.safetensors")
    way = _norm({key: one[key] - base[key] for key in base})
    for name in ("parts", "two"):
        other = tensors(tmp_path / name / "toy.safetensors")
        difference = _norm({key: one[key] - other[key] for key in base})
        print(f"{name}: difference {difference:.3g} of a way of {way:.3g}")
        assert difference < 1e-3 * way
