"""Names of options that newer versions of the reference and its graphical front end write, and that do not exist here.

A value that changes nothing is only worth a warning. One that would change what is trained is refused: silently
training something else is worse than an error.
"""

from __future__ import annotations

from typing import Any

# No value of these changes what is trained: speed, memory, logging, validation, the launcher, the front end itself.
HARMLESS = frozenset(
    {
        "blocks_to_swap",
        "cpu_offload_checkpointing",
        "deepspeed",
        "disable_mmap_load_safetensors",
        "epoch",
        "fp16_master_weights_and_gradients",
        "fused_backward_pass",
        "fused_optimizer_groups",
        "log_config",
        "offload_optimizer_device",
        "offload_optimizer_nvme_path",
        "offload_param_device",
        "offload_param_nvme_path",
        "skip_cache_check",
        "use_safetensors",
        "wandb_run_id",
        "zero3_init_flag",
        "zero3_save_16bit_model",
        "zero_stage",
    }
)

# These change what is trained, unless they have one of these values (or are false, 0 or empty).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_text_encoder_outputs": (),
    "cache_text_encoder_outputs_to_disk": (),
    "fp8_base_unet": (),
    "initial_epoch": (1,),
    "initial_step": (),
    "learning_rate_te": (),
    "learning_rate_te1": (),
    "learning_rate_te2": (),
    "lr_decay_steps": (),
    "lr_scheduler_min_lr_ratio": (),
    "lr_scheduler_timescale": (),
    "no_token_padding": (),
    "noise_offset_type": ("original",),
    "optimizer_schedulefree_wrapper": (),
    "resize_interpolation": (),
    "schedulefree_wrapper_args": (),
    "sdxl": (),
    "sdxl_cache_text_encoder_outputs": (),
    "sdxl_no_half_vae": (),
    "skip_until_initial_step": (),
    "stop_text_encoder_training": (),
    "train_text_encoder": (),
}

_OFF = frozenset({"false", "0", "0.0", "", "none", "[]"})


def is_foreign(name: str) -> bool:
    """True if the name is known, but not ours."""
    return name in HARMLESS or name in NEUTRAL


def changes_training(name: str, value: Any) -> bool:
    """True if leaving this foreign option out would train something else than the user asked for."""
    text = str(value).lower()
    return name in NEUTRAL and text not in _OFF and text not in {str(neutral).lower() for neutral in NEUTRAL[name]}
