"""Values that options bring with them: what one switches on or sets in another, before anything is checked."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

SDXL_BUCKET_STEP = 32

# (option, option that takes a value from it unless it is given itself, the value).
IMPLIES: tuple[tuple[str, str, Any], ...] = (
    ("cache_latents_to_disk", "cache_latents", True),
    ("cache_text_encoder_outputs_to_disk", "cache_text_encoder_outputs", True),
    ("diffusers_xformers", "xformers", True),
    ("sdxl", "bucket_reso_steps", SDXL_BUCKET_STEP),
)


def implied(values: Mapping[str, Any], known: Container[str]) -> tuple[dict[str, Any], list[str]]:
    """Values that others bring with them, of options that the script knows, and a line about each."""
    rows = [
        (name, target, value)
        for name, target, value in IMPLIES
        if target in known and values.get(name) and not values.get(target)
    ]
    lines = [
        f"--{name} switches --{target} on" if value is True else f"--{name} sets --{target} {value}"
        for name, target, value in rows
    ]
    return {**_implied_name(values), **_no_previews(values), **{target: value for _, target, value in rows}}, lines


def _implied_name(values: Mapping[str, Any]) -> dict[str, str]:
    """Files of textual inversion have the name of their word, unless another is given."""
    if not values.get("token_string") or values.get("output_name"):
        return {}
    return {"output_name": re.sub(r"[/\\\0]", "_", "_".join(values["token_string"]))}


def _no_previews(values: Mapping[str, Any]) -> dict[str, Any]:
    """An empty --sample_prompts switches off the previews that a configuration file asks for."""
    if "sample_prompts" not in values or values["sample_prompts"]:
        return {}
    return {"sample_at_first": False, "sample_every_n_steps": None, "sample_every_n_epochs": None}
