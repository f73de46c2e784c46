"""Three steps of each network, precision, text treatment and objective: it runs, learns, and each option counts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.cells_fixtures import (
    BLIND_AT_64_PX,
    TEXT_LAYERS,
    UNET_LAYERS,
    UNET_LAYERS_WITH_CONVOLUTIONS,
    Runner,
)
from tests.training.runs import train, write_photos

LYCORIS_STARTS_AT_ZERO = {"lokr": "lokr_w2_b", "loha": "hada_w2_a"}


@pytest.fixture
def fit(tmp_path, model, model_sd2, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sd1": model, "sd2": model_sd2}, photos, monkeypatch)


# ---- networks


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("options", "unet", "text"),
    [
        ((), UNET_LAYERS, TEXT_LAYERS),
        (("--network_args", "conv_dim=2", "conv_alpha=1"), UNET_LAYERS_WITH_CONVOLUTIONS, TEXT_LAYERS),
        (("--network_train_unet_only",), UNET_LAYERS, 0),
        (("--network_train_text_encoder_only",), 0, TEXT_LAYERS),
    ],
    ids=["lierla", "c3lier", "unet_only", "te_only"],
)
def test_every_layer_of_a_lora_learns(fit, family, options, unet, text):
    done = fit(*options, family=family)
    assert (done.count("lora_unet_"), done.count("lora_te_")) == (unet, text)
    assert not done.unmoved
    assert done.metadata["ss_base_model_version"] == {"sd1": "sd_v1", "sd2": "sd_v2"}[family]


def test_block_rates(fit):
    """Blocks of factor 0 are left out of the file; the others move by their own rate (Adam's first steps show it)."""
    down = "down_lr_weight=0,0,0,0,0.1,0.1,1,1,1,1,1,1"
    done = fit("--network_args", down, "mid_lr_weight=0", "--network_train_unet_only")
    assert done.count("lora_unet_mid_block") == 0
    assert done.count("lora_unet_down_blocks_0") == 0
    assert done.count("lora_unet_up_blocks") > 0
    ups = {key: up.abs().max() for key, up in done.tensors.items() if "lora_up" in key and "_ff_net_2" in key}
    slow = max(value for key, value in ups.items() if "down_blocks_1_attentions" in key)
    fast = min(value for key, value in ups.items() if "up_blocks" in key)
    assert 0 < slow < 3.5e-4 < 1e-3 < fast


def test_ranks_and_weights_of_a_file_go_on(fit):
    first = fit("--network_dim", "3", "--network_alpha", "2", "--network_train_unet_only")
    weights = ("--network_weights", str(first.file))
    second = fit(*weights, "--dim_from_weights", "--network_train_unet_only")
    before, after = first.tensors, second.tensors
    assert after.keys() == before.keys()
    assert (second.metadata["ss_network_dim"], second.metadata["ss_network_alpha"]) == ("3", "2.0")
    for key, tensor in after.items():
        assert tensor.shape == before[key].shape
        assert (tensor - before[key]).abs().max() < 0.02  # three small steps away, not begun anew


def test_base_weights_are_in_the_base_and_not_in_the_network(fit):
    """Merged or loaded, a network makes the same model; merging one with convolutions does not widen later networks."""
    wide = fit("--network_args", "conv_dim=2", "--learning_rate", "0.05")
    base = ("--base_weights", str(wide.file))
    merged = fit(*base, "--base_weights_multiplier", "1.0")
    loaded = fit("--network_weights", str(wide.file), "--dim_from_weights")
    halved = fit(*base, "--base_weights_multiplier", "0.5")
    plain = fit()
    assert merged.losses[0] == pytest.approx(loaded.losses[0], rel=1e-4)
    assert abs(merged.losses[0] - plain.losses[0]) > 1e-3
    assert abs(merged.losses[0] - halved.losses[0]) > 1e-3
    assert merged.modules == plain.modules
    assert plain.count("lora_") == UNET_LAYERS + TEXT_LAYERS
    assert wide.count("lora_unet_") == loaded.count("lora_unet_") == UNET_LAYERS_WITH_CONVOLUTIONS


def test_norms_stay_below_their_limit(fit):
    done = fit("--scale_weight_norms", "0.01", "--learning_rate", "0.05")
    scalars = done.reports[-1].scalars
    assert scalars["max_norm/keys_scaled"] > 0
    assert scalars["max_norm/max_key_norm"] <= 0.01 * 1.001
    tensors = done.tensors
    for name in done.modules:
        up, down = (tensors[f"{name}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
        scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
        assert (up @ down).norm() * scale <= 0.01 * 1.001


def test_network_multiplier_of_a_data_set(fit, photos, tmp_path):
    """A data set's images meet the network at the data set's strength: of a network that does much, it shows."""
    first = fit("--learning_rate", "0.05", "--network_train_unet_only")
    losses = {}
    for multiplier in (0.0, 0.5, 1.0):
        file = tmp_path / f"data{multiplier}.toml"
        file.write_text(
            f"[[datasets]]\nresolution = 64\nnetwork_multiplier = {multiplier}\n"
            f'[[datasets.subsets]]\nimage_dir = "{photos / "1_sks thing"}"\nclass_tokens = "sks"\n'
        )
        options = ("--dataset_config", str(file), "--network_weights", str(first.file))
        losses[multiplier] = fit(*options, "--network_train_unet_only", steps=1).losses[0]
    assert losses[0.0] != pytest.approx(losses[0.5], rel=1e-3)
    assert losses[0.5] != pytest.approx(losses[1.0], rel=1e-3)


@pytest.mark.parametrize(
    ("family", "algo", "preset", "unet_layers"),
    [
        ("sd1", "lokr", "", UNET_LAYERS_WITH_CONVOLUTIONS + 4),  # first and last convolution, time embedding
        ("sd2", "loha", "attn-mlp", UNET_LAYERS),
        ("sd1", "loha", "attn-only", 16 * 2 * 4),
    ],
    ids=["default", "attn-mlp", "attn-only"],
)
def test_lycoris(fit, family, algo, preset, unet_layers):
    """Presets name classes of blocks: as many layers are found as the model has of them."""
    pytest.importorskip("lycoris")
    args = (f"algo={algo}", "factor=2", *((f"preset={preset}",) if preset else ()))
    done = fit("--network_module", "lycoris.kohya", "--network_args", *args, family=family)
    assert done.count("lora_unet_") == unet_layers
    ends = [(key, tensor) for key, tensor in done.tensors.items() if LYCORIS_STARTS_AT_ZERO[algo] in key]
    text = [tensor for key, tensor in ends if key.startswith("lora_te")]
    assert len(text) == (8 if preset == "attn-only" else TEXT_LAYERS)
    assert all(bool(tensor.any()) for tensor in text)
    assert sum(bool(tensor.any()) for _, tensor in ends) >= len(ends) - len(BLIND_AT_64_PX)


def test_files_that_do_not_fit_a_network_of_lycoris(fit, model, photos, tmp_path, capsys):
    """Its own errors are those of torch, and a file with nothing for it is loaded in silence."""
    pytest.importorskip("lycoris")
    shared = ("--network_module", "lycoris.kohya", "--network_args", "algo=locon", "--network_dim")
    done = fit(*shared, "2", steps=1)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(2)}, other)
    damaged = tmp_path / "damaged.safetensors"
    changed = {
        key: tensor[0] if "mid_block" in key and tensor.dim() else tensor for key, tensor in done.tensors.items()
    }
    save_file({key: tensor.contiguous() for key, tensor in changed.items()}, damaged)
    for more, words in (
        (("--network_weights", str(done.file)), "does not fit --network_module lycoris.kohya"),
        (("--network_weights", str(other)), "has no weights for any layer of this network"),
        (("--base_weights", str(damaged)), "cannot be merged by --network_module lycoris.kohya"),
    ):
        assert train(model, photos, tmp_path / "out", *shared, "4", *more) == 1
        error = capsys.readouterr().err.partition("error: ")[2].strip()
        assert words in error
        assert len(error.splitlines()) == 1


def test_lycoris_on_a_float8_base(fit, caplog):
    pytest.importorskip("lycoris")
    args = ("algo=loha", "preset=attn-mlp", "bypass_mode=True")
    fp8 = ("--mixed_precision", "bf16", "--fp8_base")
    done = fit("--network_module", "lycoris.kohya", *fp8, "--network_args", *args)
    assert any(bool(tensor.any()) for key, tensor in done.tensors.items() if "hada_w2_a" in key)
    assert "bypass_mode=True" in caplog.text


def test_a_plug_in_that_refuses_is_one_line(model, photos, tmp_path, capsys):
    pytest.importorskip("lycoris")
    assert train(model, photos, tmp_path, "--network_module", "lycoris.kohya", "--network_args", "algo=nonsense") == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "--network_module lycoris.kohya" in said
    assert "nonsense" in said


# ---- precision


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [
        (("--mixed_precision", "bf16"), torch.float32, 0.02),
        (("--mixed_precision", "bf16", "--full_bf16"), torch.bfloat16, 0.02),
        (("--mixed_precision", "bf16", "--fp8_base"), torch.float32, 0.15),
        (("--mixed_precision", "bf16", "--fp8_base", "--gradient_checkpointing"), torch.float32, 0.15),
        (("--gradient_checkpointing", "--mem_eff_attn", "--lowram", "--highvram"), torch.float32, 1e-5),
        (("--mixed_precision", "bf16", "--no_half_vae", "--save_precision", "fp16"), torch.float16, 0.02),
    ],
    ids=["bf16", "full_bf16", "fp8", "fp8_checkpointing", "float32", "save_fp16"],
)
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_precision(fit, family, options, dtype, tolerance):
    exact, done = fit(family=family, steps=1), fit(*options, family=family)
    assert done.losses[0] == pytest.approx(exact.losses[0], rel=tolerance)
    assert not done.unmoved
    assert {tensor.dtype for tensor in done.tensors.values()} == {dtype}


# ---- text


def test_clip_skip(fit):
    """The skipped last layer of the text encoder learns nothing; all below it does."""
    plain, done = fit(steps=1), fit("--clip_skip", "2")
    assert plain.losses[0] != done.losses[0]
    last = "lora_te_text_model_encoder_layers_1_"
    assert done.unmoved == {name for name in done.modules if name.startswith(last)}
    assert done.metadata["ss_clip_skip"] == "2"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_long_and_weighted_captions(fit, tmp_path, family):
    """What stands beyond 75 and 150 tokens, and the weights of words, change the loss."""
    data = write_photos(tmp_path / "data", [(64, 64)])
    words = [f"(word:1.3) number {index}, " for index in range(40)]  # about 11 tokens each
    (data / "1_sks thing" / "photo0.caption").write_text("".join(words))
    runs = [
        (),
        ("--max_token_length", "150"),
        ("--max_token_length", "225"),
        ("--weighted_captions", "--max_token_length", "225"),
    ]
    losses = [fit(*options, family=family, data=data, steps=1).losses[0] for options in runs]
    assert len(set(losses)) == len(runs)


# ---- noise and loss


@pytest.mark.parametrize(
    "options",
    [
        ("--noise_offset", "0.1"),
        ("--noise_offset", "0.1", "--adaptive_noise_scale", "0.5"),
        ("--multires_noise_iterations", "4", "--multires_noise_discount", "0.4"),
        ("--noise_offset", "0.1", "--multires_noise_iterations", "4", "--ip_noise_gamma", "0.1"),
        ("--ip_noise_gamma", "0.1"),
        ("--min_timestep", "900"),
        ("--max_timestep", "100"),
        ("--min_snr_gamma", "0.01"),
        ("--debiased_estimation_loss",),
        ("--v_pred_like_loss", "0.5"),
        ("--zero_terminal_snr",),
    ],
    ids=lambda options: "+".join(word.strip("-") for word in options if word.startswith("--")),
)
def test_objective(fit, plain_losses, options):
    done = fit(*options)
    assert done.losses[0] != pytest.approx(plain_losses["sd1"], rel=1e-4)
    assert not done.unmoved


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred"),
        ("--min_snr_gamma", "1"),
        ("--zero_terminal_snr", "--min_timestep", "999"),
    ],
    ids=["plain", "zero_snr", "min_snr", "last_step"],
)
def test_velocity_objective(fit, plain_losses, options):
    done = fit("--v_parameterization", *options, family="sd2")
    assert done.losses[0] != pytest.approx(plain_losses["sd2"], rel=1e-4)
    assert not done.unmoved
    assert done.metadata["ss_base_model_version"] == "sd_v2_v"
    assert done.metadata["modelspec.prediction_type"] == "v"


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory, model, model_sd2, photos) -> dict[str, float]:
    """First loss of a run without any option, by family."""
    with pytest.MonkeyPatch.context() as patch:
        run = Runner(tmp_path_factory.mktemp("plain"), {"sd1": model, "sd2": model_sd2}, photos, patch)
        return {family: run(family=family, steps=1).losses[0] for family in ("sd1", "sd2")}


# ---- rates and runs


def test_a_rate_of_zero_is_refused(model, photos, tmp_path, capsys):
    assert train(model, photos, tmp_path, "--learning_rate", "0") == 1
    assert "learning rate" in capsys.readouterr().err


def test_runs_of_one_process_do_not_influence_each_other(fit, monkeypatch):
    """The same run before and after one that changes all it can gives the same bytes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = fit("--network_dropout", "0.1")
    other = (
        "--network_args", "conv_dim=2", "module_dropout=0.5", "--v_parameterization", "--zero_terminal_snr",
        "--mixed_precision", "bf16", "--gradient_checkpointing", "--deterministic", "--seed", "1",
    )  # fmt: skip
    fit(*other, family="sd2")
    second = fit("--network_dropout", "0.1")
    assert first.file.read_bytes() == second.file.read_bytes()
