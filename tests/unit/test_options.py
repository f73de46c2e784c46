"""Declarations, checks, precedence and messages of the options."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.log import UserError, nearest
from library.options import DataOptions, LogOptions, LoopOptions, NetworkOptions, NoiseOptions, ScheduleOptions
from library.options.base import OptionGroup, dataset_specs, option, specs_by_name, specs_of
from library.options.parser import build_parser
from library.options.script import parse
from library.options.scripts import (
    CONVERT_MODEL,
    EXTRACT_LORA_FROM_MODELS,
    GEN_IMG,
    SCRIPTS,
    TRAIN_CONTROLNET,
    TRAIN_DB,
    TRAIN_NETWORK,
)
from library.options.settings import ScriptOptions
from library.options.values import split_pairs

ROOT = Path(__file__).resolve().parents[2]
LOOSE = ScriptOptions("train_network.py", TRAIN_NETWORK.groups)  # nothing required


def problems_of(*argv: str, script: ScriptOptions = LOOSE) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(script, argv)
    return str(caught.value).splitlines()


def warnings_of(*argv: str) -> str:
    return "\n".join(parse(LOOSE, argv).warnings)


def config(folder: Path, text: str) -> str:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- declarations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_default_passes_its_own_check(script: ScriptOptions):
    for group in script.groups:
        group()
    assert parse(ScriptOptions("x", script.groups, script.defaults), []).warnings == ()


def test_groups_are_frozen_and_refuse_unknown_names():
    options = NoiseOptions(noise_offset=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.noise_offset = 0.2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        NoiseOptions(noise_ofset=0.1)  # pyright: ignore[reportCallIssue]


def test_values_given_in_python_pass_the_same_checks():
    with pytest.raises(UserError, match="max_train_steps = 0: must be 1 or more"):
        LoopOptions(max_train_steps=0)
    assert DataOptions(resolution=512).resolution == (512, 512)  # pyright: ignore[reportArgumentType]


def test_two_options_of_one_name_are_a_programming_error():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice(OptionGroup):
        v2: bool = option(False, help="again")

    with pytest.raises(ValueError, match="v2 is declared twice"):
        specs_by_name((*TRAIN_NETWORK.groups, Twice))


def test_levels_of_the_data_set_file():
    subset, dataset = dataset_specs((DataOptions,), "subset"), dataset_specs((DataOptions,), "dataset")
    assert {"batch_size", "resolution", "enable_bucket"} <= set(dataset) - set(subset)
    assert {"num_repeats", "shuffle_caption", "keep_tokens", "caption_separator"} <= set(subset)
    assert not {"prior_loss_weight", "train_data_dir", "debug_dataset", "train_batch_size"} & set(dataset)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_option_has_help_and_shows_in_the_help_text(script: ScriptOptions):
    text = build_parser(script).format_help()
    for group in script.groups:
        for spec in specs_of(group):
            assert spec.told.help
            assert f"--{spec.name}" in text


# --- values -----------------------------------------------------------------------------------------------------------


def test_pairs_are_cut_at_the_first_equals_sign():
    assert split_pairs(["a=b=c", "d = 1"], "network_args") == {"a": "b=c", "d": "1"}
    assert split_pairs(None, "network_args") == {}
    with pytest.raises(UserError, match="--network_args: a is given twice"):
        split_pairs(["a=1", "a=2"], "network_args")
    assert problems_of("--network_args", "conv_dim") == [
        "--network_args conv_dim: item 'conv_dim' must have the form key=value"
    ]


@pytest.mark.parametrize("between", [" ", ", ", ",", ";"])
def test_several_pairs_in_one_pair_of_quotes_are_told_apart(between: str):
    together = between.join(("conv_dim=4", "conv_alpha = 1", "down_lr_weight=0,1"))
    (problem,) = problems_of("--network_args", together)
    assert problem.endswith('give each its own quotes: "conv_dim=4" "conv_alpha = 1" "down_lr_weight=0,1"')
    assert f"--network_args {together}: " in problem
    assert parse(LOOSE, ["--network_args", "down_lr_weight=0, 1"]).value_of("network_args") == ["down_lr_weight=0, 1"]


@given(st.integers(), st.floats(allow_nan=True, allow_infinity=True))
def test_ranges_hold_for_any_number(whole: int, real: float):
    specs = specs_by_name((LoopOptions, NoiseOptions, NetworkOptions))
    for name, value, inside in (
        ("max_train_steps", whole, whole >= 1),
        ("min_timestep", whole, 0 <= whole <= 999),
        ("network_dropout", real, 0 <= real < 1),
        ("adaptive_noise_scale", real, abs(real) < float("inf")),
    ):
        for raw in (value, repr(value)):
            if inside:
                assert specs[name].check(raw) == value
            else:
                with pytest.raises(ValueError, match="must be"):
                    specs[name].check(raw)


# --- precedence, sources ----------------------------------------------------------------------------------------------


def test_precedence_and_sources(tmp_path: Path):
    file = config(tmp_path, "[any]\nnetwork_dim = 8\nxformers = true\n\n[other]\nno_metadata = true\nseed = 3\n")
    argv = ["--config_file", file, "--network_dim", "16", "--no-xformers", "--no-no_metadata"]
    settings = parse(LOOSE, argv)
    assert settings[NetworkOptions].network_dim == 16
    assert settings.value_of("xformers") is False
    assert settings.value_of("no_metadata") is False
    assert settings[LoopOptions].seed == 3
    assert settings.source_of("network_dim") == "command line"
    assert settings.source_of("seed") == f"{file} line 7"
    assert settings.source_of("v2") == "default"
    assert settings.given("seed")
    assert not settings.given("v2")
    with pytest.raises(KeyError):
        settings.source_of("no_such_option")


def test_a_script_may_have_its_own_defaults():
    script = ScriptOptions("x", (LoopOptions,), {"max_train_steps": 7})
    assert parse(script, [])[LoopOptions].max_train_steps == 7
    assert parse(script, ["--max_train_steps", "9"])[LoopOptions].max_train_steps == 9


def test_empty_text_and_none_mean_absent():
    settings = parse(LOOSE, ["--vae", "", "--save_precision", "None", "--network_dim", "none", "--save_model_as=None"])
    for name in ("vae", "save_precision", "network_dim", "save_model_as"):
        assert settings.value_of(name) is None


def test_none_is_no_folder_but_may_be_a_name():
    settings = parse(LOOSE, ["--reg_data_dir", "None", "--vae", "none", "--output_name", "None"])
    assert (settings.value_of("reg_data_dir"), settings.value_of("vae")) == (None, None)
    assert settings.value_of("output_name") == "None"


def test_no_prompts_are_no_previews(tmp_path: Path):
    text = 'sample_prompts = "a.txt"\nsample_at_first = true\nsample_every_n_steps = 5\nsample_every_n_epochs = 1\n'
    words = ["--config_file", config(tmp_path, text)]
    names = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
    assert all(parse(LOOSE, words).value_of(name) for name in names)
    settings = parse(LOOSE, [*words, "--sample_prompts", ""])
    assert not any(settings.value_of(name) for name in names)
    assert not any("sample" in line for line in settings.warnings)
    assert problems_of("--sample_at_first") == ["--sample_at_first needs --sample_prompts"]


def test_negative_numbers_on_the_command_line():
    for text in ("-0.001", "-1e-3", "-.1E-2"):
        settings = parse(LOOSE, ["--noise_offset", "0.1", "--adaptive_noise_scale", text])
        assert settings[NoiseOptions].adaptive_noise_scale == -0.001


def test_secrets_are_scrubbed():
    settings = parse(LOOSE, ["--wandb_api_key", "k", "--huggingface_token", "t"])
    assert settings[LogOptions].wandb_api_key == "k"
    assert settings.as_flat_dict()["huggingface_token"] == "t"
    assert not {"wandb_api_key", "huggingface_token"} & set(settings.scrubbed_dict())


# --- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("network_dim", "x", "must be a whole number"),
        ("train_batch_size", 0, "must be 1 or more"),
        ("learning_rate", -1, "must be 0 or more"),
        ("caption_dropout_rate", 1.5, "must be from 0 to 1"),
        ("mixed_precision", "fp8", "must be one of no, fp16, bf16"),
        ("max_token_length", 100, "must be one of 75, 150, 225"),
        ("resolution", "512x512", "must be one side (512) or width,height (512,768) in pixels"),
        ("bucket_reso_steps", 60, "must be 8 or more and a multiple of 8"),
        ("caption_separator", "", "must not be empty"),
    ],
)
def test_the_same_check_on_all_three_ways(tmp_path: Path, name: str, value: object, reason: str):
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    file = config(tmp_path, f"# a remark\n{name} = {shown}\n")
    assert problems_of("--config_file", file) == [f"{file} line 2: {name} = {shown}: {reason}"]
    assert problems_of(f"--{name}={value}") == [f"--{name} {value}: {reason}"]
    group = next(group for group in LOOSE.groups if name in specs_by_name((group,)))
    with pytest.raises(UserError) as caught:
        group(**{name: value})
    assert str(caught.value).endswith(reason)


@pytest.mark.parametrize("more", [(), ("--enable_bucket", "--bucket_no_upscale")])
def test_limits_of_buckets_that_nobody_uses(more: tuple[str, ...]):
    """Without buckets a small largest side is no contradiction to the usual smallest one."""
    assert parse(LOOSE, ["--resolution", "64", "--max_bucket_reso", "128", *more]).value_of("max_bucket_reso") == 128


def test_all_problems_at_once(tmp_path: Path):
    file = config(tmp_path, 'learing_rate = 1e-4\nnetwork_dim = "x"\nseed = true\nv2 = 1\n')
    found = problems_of("--config_file", file, "--train_batch_sise", "2", "--max_train_steps", "0")
    assert found == [
        f"{file} line 1: learing_rate: there is no such option (did you mean learning_rate?)",
        "--train_batch_sise: there is no such option (did you mean train_batch_size?)",
        f'{file} line 2: network_dim = "x": must be a whole number',
        f"{file} line 3: seed = true: must be a whole number",
        f"{file} line 4: v2 = 1: must be true or false (without quotes)",
        "--max_train_steps 0: must be 1 or more",
    ]


def test_command_line_problems_are_one_line():
    assert problems_of("--network_dim") == ["command line: argument --network_dim: expected one argument; see --help"]
    assert problems_of("stray") == ["command line: 'stray' belongs to no option; texts with blanks need quotes"]
    switch = "a switch takes no value; write"
    assert problems_of("--cache_latents", "true") == [f"command line: --cache_latents true: {switch} --cache_latents"]
    assert problems_of("--v2", "False") == [f"command line: --v2 False: {switch} --no-v2"]
    assert "long dash; write two hyphens" in problems_of("\N{EN DASH}seed", "1")[0]
    assert problems_of("--no-metadata") == ["--no-metadata: there is no such option (did you mean no_metadata?)"]
    assert problems_of("--network_di", "4")[0].startswith("--network_di: there is no such option")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--adaptive_noise_scale 0.1", "--adaptive_noise_scale needs --noise_offset"),
        ("--scale_v_pred_loss_like_noise_pred", "needs --v_parameterization"),
        ("--v_pred_like_loss 1 --v_parameterization --v2", "exclude each other"),
        ("--full_fp16", "--full_fp16 needs --mixed_precision fp16"),
        ("--full_bf16 --mixed_precision fp16", "--full_bf16 needs --mixed_precision bf16"),
        ("--fp8_base", "--fp8_base needs --mixed_precision"),
        ("--log_with tensorboard", "needs --logging_dir"),
        ("--min_timestep 500 --max_timestep 500", "must be below"),
        ("--enable_bucket --min_bucket_reso 512 --max_bucket_reso 256", "must not be above"),
        ("--use_8bit_adam --use_lion_optimizer", "exclude each other"),
        ("--debug_dataset --dataset_class a.B", "exclude each other"),
        ("--use_8bit_adam --optimizer_type Lion", "exclude each other"),
        ("--network_train_unet_only --network_train_text_encoder_only", "exclude each other"),
        ("--dim_from_weights", "needs --network_weights"),
        ("--base_weights a --base_weights_multiplier 1 2", "has 2 numbers for 1 files"),
        ("--lr_warmup_steps 10", "use constant_with_warmup"),
        ("--lr_warmup_steps 10 --lr_scheduler_type StepLR", "--lr_scheduler_type"),
        ("--cache_latents --color_aug", "latents cannot be cached"),
        ("--cache_latents_to_disk --dataset_class a.B", "exclude each other"),
        ("--cache_latents_to_disk --random_crop", "latents cannot be cached"),
        ("--face_crop_aug_range 3.0,1.0", "the lower one first"),
    ],
)
def test_combinations_refused(argv: str, part: str):
    found = problems_of(*argv.split())
    assert len(found) == 1
    assert part in found[0]


def test_something_learns_to_the_end():
    loose = ScriptOptions("train_db.py", TRAIN_DB.groups)
    (found,) = problems_of("--learning_rate", "0", "--stop_text_encoder_training", "2", script=loose)
    assert "nothing would learn" in found
    parse(loose, ("--learning_rate", "0"))


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--v_parameterization", "without --v2"),
        ("--v2 --clip_skip 2", "--clip_skip with --v2"),
        ("--zero_terminal_snr", "without --v_parameterization"),
        ("--cache_latents_to_disk", "switches --cache_latents on"),
        ("--dataset_config a.toml --train_data_dir b", "--train_data_dir ignored: --dataset_config says"),
        ("--in_json a --train_data_dir b --reg_data_dir c", "--reg_data_dir ignored: --in_json says"),
        ("--dataset_class a.B --dataset_config c.toml", "--dataset_config ignored: --dataset_class says"),
        ("--in_json a --color_aug", "latents prepared ahead are not used"),
        ("--max_train_epochs 3 --max_train_steps 3", "--max_train_epochs decides"),
        ("--save_last_n_epochs 2", "has no effect without"),
        ("--fused_backward_pass", "ignored"),
        ("--initial_epoch 1", "ignored"),
        ("--huber_c 0.2", "no effect without --loss_type huber"),
        ("--noise_offset_random_strength", "has no effect without --noise_offset"),
        ("--max_validation_steps 2", "has no effect without --validation_split"),
        ("--dynamo_backend eager", "has no effect without --torch_compile"),
        ("--persistent_data_loader_workers", "--persistent_data_loader_workers: accepted"),
    ],
)
def test_combinations_doubted(argv: str, part: str):
    assert part in warnings_of(*argv.split())


def test_an_option_brings_only_what_its_script_knows():
    """Drawing has no buckets, so nothing is said of their step."""
    drawing, training = ("--sdxl", "--ckpt", "a", "--prompt", "b"), ("--sdxl", "--conditioning_data_dir", "a")
    assert not any("bucket" in line for line in parse(GEN_IMG, drawing).warnings)
    loose = ScriptOptions("train_controlnet.py", TRAIN_CONTROLNET.groups)
    found = parse(loose, training)
    assert "--sdxl sets --bucket_reso_steps 32" in found.warnings
    assert found.value_of("bucket_reso_steps") == 32


@pytest.mark.parametrize(
    "argv",
    [
        "--max_train_epochs None --max_train_steps 3",
        "--dynamo_backend no",
        "--no-persistent_data_loader_workers",
        "--noise_offset 0 --adaptive_noise_scale 0.1",
        "--noise_offset 0.1 --multires_noise_iterations 6",
        "--v_pred_like_loss 0 --v_parameterization --v2",
        "--max_train_epochs 3",
        "--lr_scheduler cosine --lr_warmup_steps 0.1",
        "--dataset_config a.toml --cache_latents --color_aug",
    ],
)
def test_combinations_that_are_fine(argv: str):
    assert warnings_of(*argv.split()) == ""


def test_disk_cache_switches_the_cache_on():
    settings = parse(LOOSE, ["--cache_latents_to_disk"])
    assert settings.value_of("cache_latents") is True
    assert not settings.given("cache_latents")


def test_what_a_run_cannot_do_without():
    assert problems_of(script=TRAIN_NETWORK) == [
        "--pretrained_model_name_or_path is missing",
        "--network_module is missing",
        "--output_dir is missing",
        "--train_data_dir or --in_json or --dataset_config or --dataset_class is missing",
    ]
    parse(TRAIN_NETWORK, ["--debug_dataset", "--output_dir", "o", "--dataset_config", "d.toml"])


def test_nearest_name():
    assert nearest("learningrate", ["learning_rate", "seed"]) == " (did you mean learning_rate?)"
    assert nearest("adamww", ["Adam", "AdamW"]) == " (did you mean AdamW?)"
    assert nearest("zzzz", ["learning_rate", "seed"]) == ""


# --- cost -------------------------------------------------------------------------------------------------------------

ASK_FOR_HELP = """
import sys
from library.options.script import parse
from library.options.scripts import TRAIN_NETWORK
try:
    parse(TRAIN_NETWORK, ["--help"])
except SystemExit as end:
    print("status", end.code)
heavy = {"torch", "diffusers", "transformers", "accelerate", "numpy", "pydantic", "rich", "cv2", "PIL"}
print("heavy", sorted(heavy & set(sys.modules)))
"""


ASK_TOOLS = """
import glob, importlib.util, sys
for file in sorted(glob.glob("tools/*.py") + glob.glob("finetune/*.py")):
    text = open(file).read()
    if "preparation_scripts" in text or "CHECK_DATASET" in text:
        spec = importlib.util.spec_from_file_location("tool", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.main(["--help"])
        except SystemExit as end:
            print("status", file, end.code)
heavy = {"torch", "diffusers", "transformers", "accelerate", "numpy", "rich", "cv2", "PIL", "onnxruntime"}
print("heavy", sorted(heavy & set(sys.modules)))
"""


def test_help_of_the_preparation_tools_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", ASK_TOOLS], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.count(".py 0\n") == 11
    assert "train_data_dir in_json out_json model_name_or_path" in " ".join(done.stdout.split())
    assert done.stdout.endswith("heavy []\n")


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "--network_module" in done.stdout
    assert done.stdout.endswith("status 0\nheavy []\n")


def test_schedule_default_is_a_whole_number():
    assert ScheduleOptions().lr_warmup_steps == 0


def test_options_without_use_here_are_told():
    words = ["--model_org", "a", "--model_tuned", "b", "--save_to", "c.safetensors", "--load_tuned_model_to", "cuda"]
    (line,) = parse(EXTRACT_LORA_FROM_MODELS, words).warnings
    assert line.startswith("--load_tuned_model_to: accepted")
    (line,) = parse(CONVERT_MODEL, ["a.ckpt", "b", "--unet_use_linear_projection"]).warnings
    assert line.startswith("--unet_use_linear_projection: accepted")
    assert parse(CONVERT_MODEL, ["a.ckpt", "b"]).warnings == ()
