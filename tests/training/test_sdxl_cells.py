"""SDXL: three steps of each network, precision, text treatment, objective and data set; each option counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.training import setup
from tests.cells_fixtures import UNREACHED_IN_SDXL, Outcome, Runner
from tests.toy import toy_spec, write_toy_folder
from tests.training.runs import SDXL_SCRIPT, train, write_photos

FOLDER = "1_sks thing"
UNET_ONLY = "--network_train_unet_only"
# The toy's U-Net has 11 transformers of 17 blocks: 2 layers around each, 10 in each block. With convolutions also 3 in
# each of 17 ResNets, 10 shortcuts, 2 downsamplers, 2 upsamplers.
UNET_LAYERS = 11 * 2 + 17 * 10
UNET_LAYERS_WITH_CONVOLUTIONS = UNET_LAYERS + 17 * 3 + 10 + 2 + 2
TEXT_LAYERS = 2 * 6, 3 * 6


@pytest.fixture
def fit(tmp_path, model_sdxl, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sdxl": model_sdxl}, photos, monkeypatch)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, model_sdxl, photos) -> Outcome:
    """A run without any option."""
    with pytest.MonkeyPatch.context() as patch:
        return Runner(tmp_path_factory.mktemp("plain"), {"sdxl": model_sdxl}, photos, patch)()


def counts(done: Outcome) -> tuple[int, int, int]:
    """Layers of the U-Net and of both text encoders in the file."""
    return done.count("lora_unet_"), done.count("lora_te1_"), done.count("lora_te2_")


# ---- networks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--network_args", "conv_dim=2", "conv_alpha=1"), (UNET_LAYERS_WITH_CONVOLUTIONS, *TEXT_LAYERS)),
        ((UNET_ONLY,), (UNET_LAYERS, 0, 0)),
        (("--network_train_text_encoder_only",), (0, *TEXT_LAYERS)),
    ],
    ids=["c3lier", "unet_only", "te_only"],
)
def test_every_layer_of_a_lora_learns(fit, options, expected):
    done = fit(*options)
    assert counts(done) == expected
    assert not done.unmoved


def test_only_what_the_unet_sees_learns(plain):
    """All of the second encoder does, through the pooled vector; the last layer of the first cannot."""
    assert counts(plain) == (UNET_LAYERS, *TEXT_LAYERS)
    assert not plain.unmoved
    last = {key: tensor for key, tensor in plain.tensors.items() if key.startswith(UNREACHED_IN_SDXL)}
    assert len(last) == 6 * 3
    assert not any(bool(tensor.any()) for key, tensor in last.items() if "lora_up" in key)


def test_the_base_stays_as_it_is(fit, model_sdxl, monkeypatch):
    """Frozen weights, bit for bit, and no gradient kept for them."""
    kept = []
    original = setup.load_models
    monkeypatch.setattr(setup, "load_models", lambda *args: kept.append(original(*args)) or kept[0])
    fit("--gradient_checkpointing")
    from library.models.load import Target, load_parts

    spec = toy_spec("sdxl")
    names = ("text_encoder", "text_encoder_2", "unet", "vae")
    fresh = load_parts(model_sdxl, spec, {name: Target(torch.float32, "cpu") for name in names})
    parts = kept[0].parts
    used = dict(zip(names, (*parts.text_encoders, parts.unet, parts.vae), strict=True))
    for name in names:
        mine = dict(used[name].named_parameters())
        for key, tensor in fresh[name].named_parameters():
            assert torch.equal(mine[key], tensor), f"{name}.{key}"
            assert mine[key].grad is None


def test_block_ranks(fit):
    """The reference gave every SDXL layer the rank of the last block."""
    dims = [0, 1, 0, 3, 1, 2, 3, 4, 0, 2, *([3] * 8), 1]
    done = fit(UNET_ONLY, "--network_args", f"block_dims={','.join(map(str, dims))}")
    assert not done.unmoved
    ranks: dict[str, set[int]] = {}
    for key, down in done.tensors.items():
        if "lora_down" in key:
            section, _, block = key.removeprefix("lora_unet_").split("_")[:3]
            ranks.setdefault(f"{section}{block if section != 'middle' else ''}", set()).add(down.shape[0])
    inputs = {f"input{block}": {dims[block]} for block in (4, 5, 7)}  # block 8 has rank 0: none
    outputs = {f"output{block}": {3} for block in range(6)}
    assert ranks == {**inputs, "middle": {2}, **outputs}


def test_block_rates(fit):
    """Blocks of factor 0 are left out of the file; the others move by their own rate (Adam's first steps show it)."""
    rates = ("down_lr_weight=1,1,1,1,0.1,0.1,1,0,0", "mid_lr_weight=0")
    done = fit(UNET_ONLY, "--network_args", *rates)
    assert done.count("lora_unet_middle") == done.count("lora_unet_input_blocks_8") == 0
    ups = {key: float(up.abs().max()) for key, up in done.tensors.items() if "lora_up" in key and "_ff_net_2" in key}
    slow = max(value for key, value in ups.items() if "_input_blocks_4" in key)
    fast = min(value for key, value in ups.items() if "_output_blocks_" in key)
    assert 0 < slow < 3.5e-4 < 1e-3 < fast


def test_each_text_encoder_moves_at_its_own_rate(fit):
    """Adam's first step is as long as the rate."""
    done = fit("--text_encoder_lr", "1e-3", "1e-5", "--unet_lr", "1e-4", steps=1)
    longest = {
        part: max(float(up.abs().max()) for key, up in done.tensors.items() if "lora_up" in key and part in key)
        for part in ("lora_te1_", "lora_te2_", "lora_unet_")
    }
    assert longest == pytest.approx({"lora_te1_": 1e-3, "lora_te2_": 1e-5, "lora_unet_": 1e-4}, rel=0.02)


@pytest.mark.parametrize(("frozen", "rates"), [("te1", ("0", "1e-3")), ("te2", ("1e-3", "0"))])
def test_a_text_encoder_with_rate_zero_is_frozen_exactly(fit, frozen, rates):
    start, done = (fit("--text_encoder_lr", *rates, steps=steps).tensors for steps in (1, 2))
    other = {"te1": "te2", "te2": "te1"}[frozen]
    still = [key for key in done if key.startswith(f"lora_{frozen}_")]
    assert all(torch.equal(done[key], start[key]) for key in still)
    assert not any(bool(done[key].any()) for key in still if "lora_up" in key)
    moving = [key for key in done if key.startswith((f"lora_{other}_", "lora_unet_")) and "lora_up" in key]
    moving = [key for key in moving if not key.startswith(UNREACHED_IN_SDXL)]
    assert not any(torch.equal(done[key], start[key]) for key in moving)


@pytest.mark.parametrize(
    ("algo", "preset", "expected", "zero"),
    [
        ("lokr", "full", UNET_LAYERS_WITH_CONVOLUTIONS, "lokr_w2_b"),
        ("loha", "attn-mlp", UNET_LAYERS, "hada_w2_a"),
    ],
)
def test_lycoris(fit, algo, preset, expected, zero):
    """A plug-in under mixed precision writes the names of files, finds each layer once and learns."""
    pytest.importorskip("lycoris")
    args = ("--network_module", "lycoris.kohya", "--network_args", f"algo={algo}", f"preset={preset}", "factor=2")
    done = fit(*args, "--mixed_precision", "bf16")
    assert counts(done) == (expected, *TEXT_LAYERS)
    assert done.count("lora_unet_input_blocks_4_1_") > 0
    ends = {key: tensor for key, tensor in done.tensors.items() if zero in key}
    unmoved = {key for key, tensor in ends.items() if not bool(tensor.any())}
    assert {key for key in unmoved if not key.startswith(UNREACHED_IN_SDXL)} == set()


# ---- precision


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [
        (("--mixed_precision", "bf16"), torch.float32, 0.02),
        (("--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing"), torch.bfloat16, 0.02),
        (("--mixed_precision", "bf16", "--fp8_base"), torch.float32, 0.15),
        (("--gradient_checkpointing", "--mem_eff_attn", "--lowram"), torch.float32, 1e-5),
        (("--no_half_vae", "--mixed_precision", "bf16", "--save_precision", "fp16"), torch.float16, 0.02),
    ],
    ids=["bf16", "full_bf16", "fp8", "float32", "save_fp16"],
)
def test_precision(fit, plain, options, dtype, tolerance):
    done = fit(*options)
    assert done.losses[0] == pytest.approx(plain.losses[0], rel=tolerance)
    assert not done.unmoved
    assert {tensor.dtype for tensor in done.tensors.values()} == {dtype}


# ---- text


def test_long_captions(fit, tmp_path):
    """What stands beyond 75 and 150 tokens changes the loss."""
    data = write_photos(tmp_path / "data", [(64, 64)])
    words = [f"a word with number {index}, " for index in range(40)]  # about 6 tokens each
    (data / FOLDER / "photo0.caption").write_text("".join(words))
    runs = [(), ("--max_token_length", "150"), ("--max_token_length", "225")]
    done = [fit(*options, data=data, steps=2) for options in runs]
    assert len({run.losses[0] for run in done}) == len(runs)
    assert not any(run.unmoved for run in done)


# ---- noise and loss


@pytest.mark.parametrize(
    "options",
    [
        ("--noise_offset", "0.1", "--adaptive_noise_scale", "0.5"),
        ("--multires_noise_iterations", "4", "--multires_noise_discount", "0.4"),
        ("--ip_noise_gamma", "0.1"),
        ("--min_snr_gamma", "0.01"),
        ("--debiased_estimation_loss",),
        ("--v_pred_like_loss", "0.5"),
        ("--min_timestep", "900"),
    ],
    ids=lambda options: "+".join(word.strip("-") for word in options if word.startswith("--")),
)
def test_objective(fit, plain, options):
    done = fit(*options, UNET_ONLY)
    assert done.losses[0] != pytest.approx(plain.losses[0], rel=1e-4)
    assert not done.unmoved


# ---- models that predict velocity


def marked(model: Path, path: Path, *keys: str, **metadata: str) -> Path:
    """The model with empty tensors of these names and these fields in its header."""
    save_file({**load_file(model), **{key: torch.zeros(0) for key in keys}}, path, metadata)
    return path


@pytest.mark.parametrize(
    "options",
    [
        ("--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred"),
        ("--zero_terminal_snr", "--min_timestep", "999"),
        ("--min_snr_gamma", "1"),
    ],
    ids=["zero_snr", "last_step", "min_snr"],
)
def test_velocity_model(tmp_path, model_sdxl, photos, monkeypatch, plain, options):
    base = marked(model_sdxl, tmp_path / "v.safetensors", "v_pred", "ztsnr")
    done = Runner(tmp_path, {"sdxl": base}, photos, monkeypatch)("--v_parameterization", *options)
    assert done.losses[0] != pytest.approx(plain.losses[0], rel=1e-4)
    assert not done.unmoved
    assert done.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert done.metadata["modelspec.prediction_type"] == "v"


def test_the_objective_of_the_model_is_checked(model_sdxl, photos, tmp_path, capsys):
    """Marker keys and header of a file, scheduler of a folder: each contradiction is one line."""
    by_key = marked(model_sdxl, tmp_path / "key.safetensors", "v_pred")
    fields = {"modelspec.prediction_type": "v"}
    by_header = marked(model_sdxl, tmp_path / "header.safetensors", **fields)
    noise = {"modelspec.prediction_type": "epsilon"}
    for_noise = marked(model_sdxl, tmp_path / "noise.safetensors", **noise)
    velocity_folder = write_toy_folder(tmp_path / "v", "sdxl", prediction_type="v_prediction")
    noise_folder = write_toy_folder(tmp_path / "n", "sdxl")
    wrong = [
        *[(base, (), "add --v_parameterization") for base in (by_key, by_header, velocity_folder)],
        *[(base, ("--v_parameterization",), "leave out --v_parameterization") for base in (for_noise, noise_folder)],
    ]
    for base, options, advice in wrong:
        assert train(base, photos, tmp_path / "out", *options, script=SDXL_SCRIPT) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert base.name in line
        assert advice in line
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ---- data


def test_latents_kept_in_memory_and_on_disk(fit, tmp_path, model, caplog):
    caplog.set_level("INFO")
    data = write_photos(tmp_path / "data", [(64, 64)] * 2)
    memory = fit("--cache_latents", UNET_ONLY, data=data)
    # SD1's archives have the same place and shape: only their fingerprint tells that another VAE made them
    assert train(model, data, tmp_path / "sd1", "--cache_latents_to_disk", "--max_train_steps", "1") == 0
    assert len(list(data.rglob("*.npz"))) == 2
    written, read = (fit("--cache_latents_to_disk", UNET_ONLY, data=data) for _ in range(2))
    assert memory.losses == written.losses == read.losses
    assert "latents: 2 images, 2 reused, 0 encoded" in caplog.text
    assert not memory.unmoved


def test_regularisation_images_count_by_their_weight(fit, tmp_path):
    """Same draws, so only the losses of regularisation images change with the weight."""
    reg = write_photos(tmp_path / "reg", [(64, 64)] * 2, seed=1)
    options = ("--reg_data_dir", str(reg), "--learning_rate", "1e-9", UNET_ONLY)
    whole, half = fit(*options, steps=4), fit(*options, "--prior_loss_weight", "0.5", steps=4)
    is_reg = [report.keys[0].startswith("0.1/") for report in whole.reports]
    assert 0 < sum(is_reg) < 4
    for of_whole, of_half, reg_image in zip(whole.losses, half.losses, is_reg, strict=True):
        assert of_half == pytest.approx(of_whole * (0.5 if reg_image else 1.0), rel=1e-3)


def test_two_data_sets_of_two_kinds(fit, photos, tmp_path):
    """DreamBooth folder and metadata file in one run, each with its own size, buckets and batch size."""
    images = tmp_path / "images"
    shutil.copytree(write_photos(tmp_path / "wide", [(200, 100)] * 2, seed=2) / FOLDER, images)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({f"photo{index}": {"caption": "a thing", "tags": "wide"} for index in range(2)}))
    file = tmp_path / "data.toml"
    file.write_text(
        f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{photos / FOLDER}"\n'
        'class_tokens = "sks"\nflip_aug = true\n'
        "[[datasets]]\nresolution = 128\nenable_bucket = true\nmin_bucket_reso = 64\n"
        f'[[datasets.subsets]]\nimage_dir = "{images}"\nmetadata_file = "{meta}"\n'
    )
    done = fit("--dataset_config", str(file), steps=4)
    assert not done.unmoved
    sizes = {(report.keys[0].partition(".")[0], report.sample_count) for report in done.reports}
    assert sizes == {("0", 2), ("1", 1)}
    first, second = json.loads(done.metadata["ss_datasets"])
    assert (first["is_dreambooth"], second["is_dreambooth"]) == (True, False)
    buckets = second["bucket_info"]["buckets"].values()
    assert [bucket["resolution"] for bucket in buckets] == [[160, 96]]  # steps of 32
