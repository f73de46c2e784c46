"""Checks that concern more than one option. Rules of the same form stand in tables, the others are small functions.

Each rule looks at options by name and holds for every script that has them. What needs the model, the data or the
device to be known is checked where those are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from library.options.control import ConditioningOptions
from library.options.data import CacheToolOptions
from library.options.generation import PromptOptions
from library.options.generation_checks import DRAWING_DOUBTS, DRAWING_NO_EFFECT_WITHOUT
from library.options.implied import SDXL_BUCKET_STEP
from library.options.settings import Settings

Rule = Callable[[Settings], str | None]

# (option, what it needs): the first does nothing right without the second.
NEEDS = (
    ("adaptive_noise_scale", "noise_offset"),
    ("scale_v_pred_loss_like_noise_pred", "v_parameterization"),
    ("dim_from_weights", "network_weights"),
    ("base_weights_multiplier", "base_weights"),
    ("resume_from_huggingface", "resume"),
    ("save_state_to_huggingface", "huggingface_repo_id"),
    ("allow_mismatch", "resume"),
    ("sample_with_ema", "ema_decay"),
    ("cache_text_encoder_outputs_variants", "cache_text_encoder_outputs"),
    ("resize_fit", "crop_size"),
    ("sample_at_first", "sample_prompts"),
    ("sample_every_n_steps", "sample_prompts"),
    ("sample_every_n_epochs", "sample_prompts"),
)

# Two options that exclude each other.
EXCLUDES = (
    ("v_pred_like_loss", "v_parameterization"),
    ("network_train_unet_only", "network_train_text_encoder_only"),
    ("full_fp16", "full_bf16"),
    ("use_8bit_adam", "use_lion_optimizer"),
    ("use_8bit_adam", "optimizer_type"),
    ("use_lion_optimizer", "optimizer_type"),
    ("cache_text_encoder_outputs", "dataset_class"),
    ("validation_split", "dataset_class"),
    ("cache_latents", "dataset_class"),
    ("debug_dataset", "dataset_class"),
    ("cache_text_encoder_outputs", "train_text_encoder"),
    ("ddp_static_graph", "stop_text_encoder_training"),
    ("crop_ratio", "resize_face_size"),
    ("crop_ratio", "crop_size"),
    ("resize_fit", "resize_face_size"),
)

# (option, options of which one must be set for it to have an effect).
NO_EFFECT_WITHOUT = (
    ("save_last_n_epochs", ("save_every_n_epochs", "save_n_epoch_ratio")),
    ("save_last_n_steps", ("save_every_n_steps",)),
    ("save_last_n_epochs_state", ("save_state",)),
    ("save_last_n_steps_state", ("save_state",)),
    ("async_upload", ("huggingface_repo_id",)),
    ("huggingface_path_in_repo", ("huggingface_repo_id",)),
    ("log_prefix", ("logging_dir", "log_with")),
    ("log_tracker_config", ("logging_dir", "log_with")),
    ("noise_offset_random_strength", ("noise_offset",)),
    ("ip_noise_gamma_random_strength", ("ip_noise_gamma",)),
    ("validate_every_n_steps", ("validation_split",)),
    ("validate_every_n_epochs", ("validation_split",)),
    ("validation_seed", ("validation_split",)),
    ("max_validation_steps", ("validation_split",)),
    ("ema_device", ("ema_decay",)),
    ("learning_rate_te1", ("train_text_encoder",)),
    ("learning_rate_te2", ("train_text_encoder",)),
    *DRAWING_NO_EFFECT_WITHOUT,
)

_FOLDERS = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")

MAX_NAME_BYTES = 200  # file systems take 255; step numbers and suffixes are added

# Options that are set by an empty text as well: an empty prompt can be drawn.
MAY_BE_EMPTY = frozenset({"prompt"})

# What is not needed to look at the data only.
NOT_FOR_DEBUG_DATASET = frozenset({"pretrained_model_name_or_path", "network_module"})


def _on(value: Any) -> bool:
    """True if a value switches its option on: 0, False, empty and None do not."""
    return bool(value)


def _full_precision(settings: Settings) -> Iterator[str]:
    for name, needed in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if settings.value_of(name) and settings.value_of("mixed_precision") != needed:
            yield f"--{name} needs --mixed_precision {needed}"


def _fp8_base(settings: Settings) -> str | None:
    if settings.value_of("fp8_base") and settings.value_of("mixed_precision") == "no":
        return (
            "--fp8_base needs --mixed_precision fp16 or bf16: float8 weights have to be computed with in one of these"
        )
    return None


def _output_name(settings: Settings) -> str | None:
    name = settings.value_of("output_name") or ""
    if any(mark in name for mark in ("/", "\\", "\0")) or name in (".", ".."):
        return f"--output_name {name}: must be a name without folders; --output_dir says where it goes"
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        return f"--output_name {name[:20]}...: is too long for a file name (over {MAX_NAME_BYTES} bytes)"
    return None


def _timesteps(settings: Settings) -> str | None:
    low, high = settings.value_of("min_timestep") or 0, settings.value_of("max_timestep") or 1000
    return f"--min_timestep {low} must be below --max_timestep {high}" if low >= high else None


def _bucket_sides(settings: Settings) -> str | None:
    """Limits that nothing can keep to. They mean nothing without buckets, or with those of the images' own sizes."""
    low, high = settings.value_of("min_bucket_reso"), settings.value_of("max_bucket_reso")
    if settings.value_of("enable_bucket") is False or settings.value_of("bucket_no_upscale"):
        return None
    if low is not None and high is not None and low > high:
        return f"--min_bucket_reso {low} must not be above --max_bucket_reso {high}"
    return None


def _multipliers(settings: Settings) -> str | None:
    files, factors = settings.value_of("base_weights"), settings.value_of("base_weights_multiplier")
    if files and factors and len(factors) > len(files):
        return f"--base_weights_multiplier has {len(factors)} numbers for {len(files)} files in --base_weights"
    return None


def _tracker_folder(settings: Settings) -> str | None:
    tracker = settings.value_of("log_with")
    if tracker in ("tensorboard", "all") and not settings.value_of("logging_dir"):
        return f"--log_with {tracker} needs --logging_dir, the folder of the logs"
    return None


def _warmup(settings: Settings) -> str | None:
    if not settings.value_of("lr_warmup_steps"):
        return None
    if settings.value_of("lr_scheduler_type"):
        return "--lr_warmup_steps has no meaning for a class given by --lr_scheduler_type; set it to 0"
    name = settings.value_of("lr_scheduler")
    if name == "constant":
        return "--lr_warmup_steps has no meaning for --lr_scheduler constant; use constant_with_warmup"
    return "--lr_warmup_steps has no meaning for --lr_scheduler adafactor; set it to 0" if name == "adafactor" else None


def _cached_augmentation(settings: Settings) -> Iterator[str]:
    if settings.value_of("cache_latents") and not settings.value_of("dataset_config"):
        for name in ("color_aug", "random_crop"):
            if settings.value_of(name):
                yield f"--{name} changes the image each time, so latents cannot be cached: drop it or --cache_latents"


def _cached_text(settings: Settings) -> str | None:
    """A network on the text encoders changes what they give; a tool that only fills the cache trains nothing."""
    trains_text = settings.value_of("network_train_unet_only") is False and CacheToolOptions not in settings
    if not settings.value_of("cache_text_encoder_outputs"):
        return None
    if not _is_sdxl(settings) and CacheToolOptions not in settings:
        return "--cache_text_encoder_outputs is for SDXL: add --sdxl or leave it out (others remember what they encode)"
    if trains_text:
        return "--cache_text_encoder_outputs needs --network_train_unet_only: text encoders that learn cannot be cached"
    return None


def _is_sdxl(settings: Settings) -> bool:
    return settings.family == "sdxl"


def _for_sdxl(settings: Settings) -> Iterator[str]:
    """What the scripts for SDXL refuse."""
    if not _is_sdxl(settings):
        return
    if settings.value_of("v2"):
        yield "--v2 is for SD 2.x models, this is for SDXL: leave it out"
    if settings.value_of("weighted_captions"):
        yield "--weighted_captions is not for SDXL: leave it out"
    steps = settings.value_of("bucket_reso_steps") or 0
    if steps % SDXL_BUCKET_STEP:
        yield f"--bucket_reso_steps {steps}: must be a multiple of {SDXL_BUCKET_STEP} for SDXL"


def _pairs(settings: Settings) -> Iterator[str]:
    """What scripts for ControlNets need, and data that have no pairs."""
    if ConditioningOptions not in settings or CacheToolOptions in settings:
        return
    if settings.value_of("dataset_config") or settings.value_of("dataset_class"):
        return
    for name in ("reg_data_dir", "in_json"):
        if settings.value_of(name):
            yield f"--{name} has no conditioning pictures: give --train_data_dir and --conditioning_data_dir instead"
    if settings.value_of("train_data_dir") and not settings.value_of("conditioning_data_dir"):
        yield "--conditioning_data_dir is missing: the folder with a conditioning picture for each image"


def _masks(settings: Settings) -> str | None:
    """A folder of masks that nobody reads, and masks where the folder holds something else."""
    masked, folder = settings.value_of("masked_loss"), settings.value_of("conditioning_data_dir")
    if masked is None or CacheToolOptions in settings:
        return None
    if ConditioningOptions not in settings:
        return "--conditioning_data_dir needs --masked_loss: masks are in it" if folder and not masked else None
    if masked:
        return (
            "--masked_loss: conditioning_data_dir holds the pictures to draw after here and can hold no masks: leave it"
            " out; --alpha_mask takes masks from the images' transparency"
        )
    return None


def _full_training(settings: Settings) -> Iterator[str]:
    """What cannot be when the model itself learns."""
    if settings.value_of("fp8_base") and _is_full(settings):
        yield "--fp8_base is for networks: float8 weights cannot learn; leave it out"
    if settings.value_of("block_lr") and settings.value_of("learning_rate") == 0:
        yield "--block_lr with --learning_rate 0, which freezes the U-Net: give a --learning_rate above 0"
    stop = settings.value_of("stop_text_encoder_training")
    if stop and stop > 0 and settings.value_of("learning_rate") == 0:
        yield (
            f"--stop_text_encoder_training {stop} with --learning_rate 0: nothing would learn from that step on; leave"
            " it out and give --max_train_steps"
        )
    if not settings.value_of("fused_backward_pass"):
        return
    if settings.value_of("mixed_precision") == "fp16":
        yield "--fused_backward_pass does not go with --mixed_precision fp16: use bf16 or no"
    if (settings.value_of("gradient_accumulation_steps") or 1) > 1:
        yield (
            "--fused_backward_pass drops each gradient at once, so there is nothing to accumulate: leave out"
            " --gradient_accumulation_steps and give a larger --train_batch_size"
        )


def _is_full(settings: Settings) -> bool:
    return settings.value_of("fused_backward_pass") is not None


def _fused_clipping(settings: Settings) -> str | None:
    limit = settings.value_of("max_grad_norm")
    if settings.value_of("fused_backward_pass") and limit:
        return f"--fused_backward_pass: --max_grad_norm {limit:g} limits each tensor's gradient by itself"
    return None


def _huber_options(settings: Settings) -> str | None:
    usual = {spec.name: spec.default for spec in settings.script.specs().values() if spec.name.startswith("huber_")}
    given = [f"--{name}" for name, default in usual.items() if settings.value_of(name) != default]
    if given and settings.value_of("loss_type") in ("l1", "l2"):
        return f"{', '.join(given)}: no effect without --loss_type huber or smooth_l1"
    return None


def _idle(settings: Settings) -> str | None:
    """Options of old command lines that this program has no use for."""
    names = (
        "load_original_model_to",
        "load_tuned_model_to",
        "unet_use_linear_projection",
        "persistent_data_loader_workers",
    )
    given = [f"--{name}" for name in names if settings.given(name) and _on(settings.value_of(name))]
    return f"{', '.join(given)}: accepted for old command lines, has no effect" if given else None


def _compiler(settings: Settings) -> str | None:
    backend = settings.value_of("dynamo_backend")
    if settings.given("dynamo_backend") and backend != "no" and not settings.value_of("torch_compile"):
        return f"--dynamo_backend {backend} has no effect without --torch_compile"
    return None


def _text_rate(settings: Settings) -> str | None:
    if settings.value_of("learning_rate_te") and settings.value_of("train_text_encoder") is False:
        return "--learning_rate_te has no effect without --train_text_encoder"
    return None


def _v_parameterization(settings: Settings) -> str | None:
    if _is_sdxl(settings):
        unusual = settings.value_of("v_parameterization")
        return "--v_parameterization: few SDXL models predict v" if unusual else None
    if settings.value_of("v_parameterization") and settings.value_of("v2") is False:
        return "--v_parameterization without --v2: few SD 1.x models predict v"
    return None


def _clip_skip(settings: Settings) -> str | None:
    if PromptOptions in settings:  # drawing takes the layer that is asked for, of any model
        return None
    if _is_sdxl(settings) and settings.value_of("clip_skip"):
        return "--clip_skip has no effect on SDXL: it always takes the last layer but one"
    if settings.value_of("v2") and settings.value_of("clip_skip"):
        return "--clip_skip with --v2: SD 2.x text encoders lack the last layer already; this is unusual"
    return None


def _zero_terminal_snr(settings: Settings) -> str | None:
    if PromptOptions in settings:  # nothing is learned, and what the model predicts its file may say
        return None
    if settings.value_of("zero_terminal_snr") and not settings.value_of("v_parameterization"):
        return "--zero_terminal_snr without --v_parameterization: at pure noise a noise prediction learns nothing"
    return None


def _ignored_folders(settings: Settings) -> Iterator[str]:
    """What says where the images are while something else decides it."""
    places = (
        ("dataset_class", (*_FOLDERS, "dataset_config")),
        ("dataset_config", _FOLDERS),
        ("in_json", ("reg_data_dir",)),
    )
    for deciding, others in places:
        if settings.value_of(deciding):
            ignored = [f"--{name}" for name in others if settings.value_of(name)]
            if ignored:
                yield f"{', '.join(ignored)} ignored: --{deciding} says where the images are"
            return


def _metadata_latents(settings: Settings) -> str | None:
    if settings.value_of("in_json") and (settings.value_of("color_aug") or settings.value_of("random_crop")):
        return "--in_json with --color_aug or --random_crop: latents prepared ahead are not used"
    return None


def _steps_and_epochs(settings: Settings) -> str | None:
    if settings.value_of("max_train_epochs") and settings.given("max_train_steps"):
        return "--max_train_steps is ignored: --max_train_epochs decides; --max_train_epochs None takes it away"
    return None


def _samples_twice(settings: Settings) -> str | None:
    if settings.value_of("sample_every_n_epochs") and settings.value_of("sample_every_n_steps"):
        return "--sample_every_n_steps is ignored: --sample_every_n_epochs decides"
    return None


REFUSALS: tuple[Rule, ...] = (
    _fp8_base,
    _output_name,
    _timesteps,
    _bucket_sides,
    _multipliers,
    _tracker_folder,
    _warmup,
    _cached_text,
    _masks,
)
DOUBTS: tuple[Rule, ...] = (
    _idle,
    _compiler,
    _v_parameterization,
    _clip_skip,
    _zero_terminal_snr,
    _metadata_latents,
    _steps_and_epochs,
    _samples_twice,
    _fused_clipping,
    _text_rate,
    _huber_options,
    *DRAWING_DOUBTS,
)


def problems(settings: Settings) -> list[str]:
    """One line for each combination that cannot work."""
    value_of = settings.value_of
    found = [
        f"--{name} needs --{needed}" for name, needed in NEEDS if _on(value_of(name)) and not _set(settings, needed)
    ]
    found += [
        f"--{one} and --{other} exclude each other" for one, other in EXCLUDES if value_of(one) and value_of(other)
    ]
    found += [*_full_precision(settings), *_cached_augmentation(settings)]
    found += [*_for_sdxl(settings), *_full_training(settings), *_pairs(settings)]
    return found + [line for rule in REFUSALS if (line := rule(settings))]


def _set(settings: Settings, name: str) -> bool:
    """True if an option has a value, be it 0."""
    value = settings.value_of(name)
    return value is not None and value is not False and value != ""


def warnings(settings: Settings) -> list[str]:
    """One line for each combination that is probably not meant."""
    found = [
        f"--{name} has no effect without {' or '.join(f'--{other}' for other in others)}"
        for name, others in NO_EFFECT_WITHOUT
        if _on(settings.value_of(name)) and not any(_on(settings.value_of(other)) for other in others)
    ]
    found += _ignored_folders(settings)
    return found + [line for rule in DOUBTS if (line := rule(settings))]


def missing(settings: Settings) -> list[str]:
    """One line for each option that the script cannot do without."""
    found: list[str] = []
    for needed in settings.script.required:
        names = (needed,) if isinstance(needed, str) else needed
        if settings.value_of("debug_dataset") and NOT_FOR_DEBUG_DATASET.intersection(names):
            continue
        if not any(_on(settings.value_of(name)) or _is_given_empty(settings, name) for name in names):
            found.append(f"{' or '.join(_as_typed(settings, name) for name in names)} is missing")
    return found


def _is_given_empty(settings: Settings, name: str) -> bool:
    return name in MAY_BE_EMPTY and settings.given(name)


def _as_typed(settings: Settings, name: str) -> str:
    return name if settings.script.specs()[name].told.positional else f"--{name}"
