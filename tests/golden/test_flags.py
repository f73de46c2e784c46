"""The command lines of the scripts are frozen: old command lines and configuration files must go on working."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.options.parser import read_command_line
from library.options.script import parse
from library.options.scripts import (
    CACHE_LATENTS,
    CACHE_TEXT,
    FINE_TUNE,
    SDXL_TRAIN,
    SDXL_TRAIN_LLLITE,
    SDXL_TRAIN_NETWORK,
    SDXL_TRAIN_TEXTUAL_INVERSION,
    TRAIN_CONTROLNET,
    TRAIN_DB,
    TRAIN_NETWORK,
    TRAIN_TEXTUAL_INVERSION,
    TRAIN_TEXTUAL_INVERSION_XTI,
)
from library.options.settings import ScriptOptions

DATA = Path(__file__).parent / "data"
SCRIPTS = {
    "train_network": TRAIN_NETWORK,
    "sdxl_train_network": SDXL_TRAIN_NETWORK,
    "sdxl_train": SDXL_TRAIN,
    "train_controlnet": TRAIN_CONTROLNET,
    "sdxl_train_control_net_lllite": SDXL_TRAIN_LLLITE,
    "train_textual_inversion": TRAIN_TEXTUAL_INVERSION,
    "sdxl_train_textual_inversion": SDXL_TRAIN_TEXTUAL_INVERSION,
    "train_textual_inversion_XTI": TRAIN_TEXTUAL_INVERSION_XTI,
    "train_db": TRAIN_DB,
    "fine_tune": FINE_TUNE,
}
ROWS = {
    name: list(csv.DictReader((DATA / f"{name}_flags.tsv").open(encoding="utf-8"), delimiter="\t")) for name in SCRIPTS
}
CASES = [pytest.param(name, row, id=f"{name} {row['option']}") for name in SCRIPTS for row in ROWS[name]]
KINDS = {"flag": "bool"}

# Where ours is wider or better than the reference, on purpose: (option, what differs).
WIDER_CHOICES = {
    "max_token_length": {"75"},
    "dynamo_backend": {"no"},
    "train_controlnet save_model_as": {"diffusers"},
}
OTHER_DEFAULTS = {"caption_extension": None}  # looks for .caption, then .txt
PARSED_TEXTS = {"resolution", "face_crop_aug_range", "block_lr"}  # texts there, numbers here
NEW_OPTIONS = {
    "allow_captionless",
    "allow_mismatch",
    "alpha_mask",
    "deterministic",
    "dry_run",
    "ema_decay",
    "ema_device",
    "huber_c",
    "huber_scale",
    "huber_schedule",
    "ip_noise_gamma_random_strength",
    "loss_type",
    "masked_loss",
    "max_validation_steps",
    "noise_offset_random_strength",
    "on_bad_caption",
    "on_bad_image",
    "on_nan",
    "sample_with_ema",
    "save_state_on_train_end",
    "validate_every_n_epochs",
    "validate_every_n_steps",
    "validation_seed",
    "validation_split",
}
# The first two are the reference's, the third is new.
TEXT_CACHE = {
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "cache_text_encoder_outputs_variants",
}
# What the loop has for every kind of training.
NEW_FOR_WORDS = {
    "caption_dropout_every_n_epochs",
    "caption_dropout_rate",
    "caption_tag_dropout_rate",
    "no_metadata",
    "training_comment",
    "weighted_captions",
}
MASKS = {"conditioning_data_dir"}  # that of the reference is in the scripts for ControlNets only
NEW_IN = {
    "train_network": set[str](),
    "sdxl_train_network": {"cache_text_encoder_outputs_variants"},
    "sdxl_train": {
        "cache_text_encoder_outputs_variants",
        "fused_backward_pass",
        "no_metadata",
        "prior_loss_weight",
        "training_comment",
    },
    "train_controlnet": {
        "sdxl",
        *TEXT_CACHE,
        "no_half_vae",
        "no_metadata",
        "prior_loss_weight",
        "reg_data_dir",
        "training_comment",
    },
    # reg_data_dir is there to be refused: pairs have no regularisation images
    "sdxl_train_control_net_lllite": {
        "cache_text_encoder_outputs_variants",
        "no_metadata",
        "prior_loss_weight",
        "reg_data_dir",
        "training_comment",
    },
    "train_db": {
        "dataset_repeats",
        "diffusers_xformers",
        "fused_backward_pass",
        "in_json",
        "no_metadata",
        "training_comment",
    },
    "fine_tune": {
        "fused_backward_pass",
        "no_half_vae",
        "no_metadata",
        "prior_loss_weight",
        "reg_data_dir",
        "training_comment",
    },
    "train_textual_inversion": NEW_FOR_WORDS,
    "sdxl_train_textual_inversion": NEW_FOR_WORDS,
    "train_textual_inversion_XTI": NEW_FOR_WORDS | {"no_half_vae"},
}
ANY_SCRIPT = ScriptOptions("train_network.py", TRAIN_NETWORK.groups)
SPECS = {
    script: {name: spec for spec in options.specs().values() for name in spec.names}
    for script, options in SCRIPTS.items()
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_is_missing_or_undeclared_here(script: str):
    assert set(SPECS[script]) == {row["option"] for row in ROWS[script]} | NEW_OPTIONS | NEW_IN[script] | MASKS


@pytest.mark.parametrize(("script", "row"), CASES)
def test_type_default_and_choices(script: str, row: dict[str, str]):
    name = row["option"]
    spec = SPECS[script][name]
    if name not in PARSED_TEXTS:
        assert spec.kind.__name__ == KINDS.get(row["type"], row["type"])
    expected = repr(OTHER_DEFAULTS[name]) if name in OTHER_DEFAULTS else row["default"]
    assert repr(spec.default) == expected
    wider = WIDER_CHOICES.get(name, set[str]()) | WIDER_CHOICES.get(f"{script} {name}", set[str]())
    choices = set() if row["choices"] == "-" else set(row["choices"].split("|"))
    assert {str(choice) for choice in spec.choices} == (choices - {"None"}) | wider
    assert ("None" in choices) <= spec.is_optional


EXAMPLES = {
    "resolution": "512,768",
    "face_crop_aug_range": "1.0,2.5",
    "min_bucket_reso": "320",
    "max_bucket_reso": "768",
    "bucket_reso_steps": "32",
    "network_dropout": "0.1",
    "cond_emb_dim": "32",
    "block_lr": ",".join(["1e-4"] * 23),
}


@pytest.mark.parametrize(("script", "row"), CASES)
def test_the_command_line_takes_the_option_with_each_choice(script: str, row: dict[str, str]):
    name = row["option"]
    if row["type"] == "flag":
        words: list[str | None] = [None]
    elif row["choices"] == "-":
        words = [EXAMPLES.get(name, "a=b" if row["type"] in ("str", "Path") else "1")]
    else:
        words = list(row["choices"].split("|"))
    for word in words:
        known, unknown, problems = read_command_line(SCRIPTS[script], [f"--{name}", *([word] if word else [])])
        assert (unknown, problems) == ([], [])
        (true_name,) = known
        value = SPECS[script][true_name].check(known[true_name].value)
        assert (value is None) == (word == "None")
        assert value is not False


def test_a_long_old_command_line_still_parses():
    words = (
        "--pretrained_model_name_or_path=model.safetensors --train_data_dir=train --resolution=512,768 "
        "--output_dir=out --network_module=networks.lora --network_dim=16 --network_alpha=1 --unet_lr=1e-4 "
        "--text_encoder_lr=5e-5 --network_args conv_dim=4 conv_alpha=1 --optimizer_type AdamW8bit "
        "--optimizer_args betas=.9,.99 --lr_scheduler cosine_with_restarts --lr_warmup_steps=100 "
        "--lr_scheduler_num_cycles 2 --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=fp16 "
        "--save_precision=fp16 --cache_latents --xformers --seed=42 --caption_extension=.txt --shuffle_caption "
        "--keep_tokens=1 --clip_skip=2 --max_token_length 225"
    )
    settings = parse(TRAIN_NETWORK, words.split())
    values = settings.as_flat_dict()
    assert values["resolution"] == (512, 768)
    assert values["text_encoder_lr"] == [5e-5]
    assert values["network_args"] == ["conv_dim=4", "conv_alpha=1"]
    assert (values["max_token_length"], values["network_alpha"], values["lr_warmup_steps"]) == (225, 1.0, 100)


def test_misspelt_caption_option_of_old_command_lines():
    settings = parse(ANY_SCRIPT, ["--caption_extention", ".cap"])
    assert settings.value_of("caption_extension") == ".cap"
    assert settings.given("caption_extension")


def test_the_cache_tool_takes_every_option_of_the_training():
    for tool in (CACHE_LATENTS, CACHE_TEXT):
        trainings = (
            TRAIN_NETWORK,
            SDXL_TRAIN_NETWORK,
            SDXL_TRAIN,
            TRAIN_CONTROLNET,
            SDXL_TRAIN_LLLITE,
            TRAIN_DB,
            FINE_TUNE,
        )
        for training in trainings:
            assert set(training.specs()) <= set(tool.specs()) | tool.passes_over
        assert set(tool.specs()) <= set(SDXL_TRAIN_NETWORK.specs()) | {"skip_existing", "sdxl", "conditioning_data_dir"}


@pytest.mark.parametrize("tool", [CACHE_LATENTS, CACHE_TEXT])
def test_the_cache_tools_take_a_full_training_s_file(tool: ScriptOptions, tmp_path: Path):
    file = tmp_path / "full.toml"
    file.write_text(
        'save_model_as = "diffusers"\nfused_backward_pass = true\nblock_lr = "1,2"\nlearning_rate_te1 = 0\n'
    )
    words = f"--config_file {file} --pretrained_model_name_or_path m --train_data_dir d --resolution 1024"
    assert parse(tool, words.split()).value_of("resolution") == (1024, 1024)


def test_the_text_cache_is_of_the_scripts_for_sdxl():
    assert set(SDXL_TRAIN_NETWORK.specs()) - set(TRAIN_NETWORK.specs()) == TEXT_CACHE
    words = "--sdxl --skip_existing --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk"
    words += " --pretrained_model_name_or_path m --train_data_dir d --resolution 1024"
    settings = parse(CACHE_TEXT, words.split())
    assert settings.value_of("cache_text_encoder_outputs_to_disk") is True
    assert settings.value_of("bucket_reso_steps") == 32
