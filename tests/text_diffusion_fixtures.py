"""Toy models as model parts, and diffusers' own pipeline around the same modules: for the parity and preview tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from library.families.base import ModelParts, ModelSource
from library.families.sd import SdFamily
from tests.toy import toy_modules, toy_spec


def toy_parts(family: str = "sd1", prediction_type: str = "epsilon") -> ModelParts:
    """A toy model in eval mode, without a file."""
    modules: dict[str, Any] = toy_modules(family)
    with torch.no_grad():  # real encoders' states have a mean; weights of captions lean on it
        modules["text_encoder"].final_layer_norm.bias.fill_(0.2)
    for module in modules.values():
        module.eval().requires_grad_(False)
    source = ModelSource("toy", Path("toy"))
    return ModelParts(
        (modules["text_encoder"],), modules["unet"], modules["vae"], toy_spec(family), prediction_type, source
    )


def diffusers_pipeline(parts: ModelParts, scheduler: Any = None) -> Any:
    """diffusers' StableDiffusionPipeline that shares the parts' U-Net and VAE.

    The text encoder is a whole copy: its clip skip looks for a ``text_model`` in it, gone in transformers 5, and of two
    encoders that share layers each would hang its collectors of hidden states on them.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    encoder = copy.deepcopy(parts.text_encoders[0])
    encoder.__dict__["text_model"] = encoder  # not as a part of itself
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=encoder,
        tokenizer=SdFamily(v2=parts.spec.family == "sd2").tokenizer,
        unet=parts.unet,
        scheduler=scheduler or DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
