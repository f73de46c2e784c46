"""Combinations of drawing options that are probably not meant; `library.options.checks` asks these rules too."""

from __future__ import annotations

from library.options.generation import PromptOptions
from library.options.settings import Settings

# (option, options of which one must be set for it to have an effect).
DRAWING_NO_EFFECT_WITHOUT = (
    ("clip_vision_strength", ("image_path", "from_image")),
    ("highres_fix_save_1st", ("highres_fix_scale", "from_image")),
    ("highres_fix_latents_upscaling", ("highres_fix_scale", "from_image")),
    ("highres_fix_upscaler", ("highres_fix_scale", "from_image")),
    ("highres_fix_upscaler_args", ("highres_fix_upscaler", "from_image")),
    ("highres_fix_strength", ("highres_fix_scale", "from_image")),
    ("use_original_file_name", ("image_path", "from_image")),
    ("strength", ("image_path", "from_image", "highres_fix_scale")),
    (
        "guide_image_path",
        (
            *("control_net_models", "control_net_lllite_models"),
            *("clip_image_guidance_scale", "vgg16_guidance_scale", "from_image"),
        ),
    ),
    ("highres_fix_disable_control_net", ("highres_fix_scale", "from_image")),
    ("network_regional_mask_max_color_codes", ("mask_path", "from_image")),
    ("network_merge", ("network_weights", "from_image")),
    ("network_pre_calc", ("network_weights", "grid_networks", "from_image")),
    ("network_show_meta", ("network_weights", "grid_networks", "from_image")),
    ("grid_weights", ("grid_networks",)),
    ("prompter_module_args", ("from_module",)),
)

# In the order in which they are asked.
_PROMPT_SOURCES = ("from_image", "interactive", "from_file", "from_module", "prompt")


def _prompt_sources(settings: Settings) -> str | None:
    """Of several sources of prompts one is taken."""
    given = [name for name in _PROMPT_SOURCES if settings.value_of(name)]
    if PromptOptions not in settings or len(given) < 2:
        return None
    return f"{', '.join(f'--{name}' for name in given[1:])}: no effect, --{given[0]} says what is drawn"


def _of_prompts_only(settings: Settings) -> str | None:
    """What pictures that are drawn again do not look at."""
    names = ("images_per_prompt", "n_iter", "shuffle_prompts", "iter_same_seed", "batch_size")
    given = [f"--{name}" for name in names if settings.given(name)]
    if not settings.value_of("from_image") or not given:
        return None
    return f"{', '.join(given)}: no effect, --from_image draws each picture once, as it was"


DRAWING_DOUBTS = (_prompt_sources, _of_prompts_only)
