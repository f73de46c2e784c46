"""Training of the model itself: the U-Net and, if asked for, the text encoders."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoint.io import is_safetensors
from library.families.base import ModelFamily, ModelParts, TextSettings
from library.log import UserError
from library.models.load import check_written
from library.options import (
    DreamBoothOptions,
    ModelFileOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
    PrecisionOptions,
)
from library.options.settings import Settings
from library.training.text_source import text_settings
from library.training.trainable import Artifact, Trainable

logger = logging.getLogger(__name__)

Rates = Mapping[str, float]  # part of the model -> learning rate above 0
TEXT_RATES = (
    ("text_encoder", "learning_rate_te"),
    ("text_encoder", "learning_rate_te1"),
    ("text_encoder_2", "learning_rate_te2"),
)
"""Text encoder, and the option of its learning rate in those scripts that have it."""


class FullTraining(Trainable):
    """The parts of the model whose learning rate is above 0."""

    def __init__(self, settings: Settings, family: ModelFamily, parts: ModelParts) -> None:
        rates = part_rates(settings)
        if not rates:
            raise UserError("nothing to train: every learning rate is 0")
        zero_snr = settings[NoiseOptions].zero_terminal_snr or parts.zero_terminal_snr
        self._family = family
        self._parts = replace(parts, zero_terminal_snr=zero_snr)
        self._clip_skip = text_settings(settings[ModelOptions], family).clip_skip
        modules = {name: module for name, module in parts.by_name().items() if name in rates}
        self._learning = modules
        self.module = nn.ModuleDict(modules)
        for module in modules.values():
            module.requires_grad_(True)
        self.may_train_text = any(name != "unet" for name in rates)
        if self.may_train_text:
            self._freeze_what_text_never_reaches()
        self._groups = list(self._make_groups(rates, settings.value_of("block_lr")))
        self._freeze_all_but(self._groups)
        self._text_stops_at: int | None = settings.value_of("stop_text_encoder_training")
        self.may_skip_parameters = self._text_stops_at is not None
        precision = settings[PrecisionOptions]
        self.casts_itself = precision.full_bf16 or precision.full_fp16  # all weights are of the type computed with
        self.artifact = Artifact(_suffix(settings[ModelFileOptions], parts), modelspec_kind="")

    @staticmethod
    def trained_parts(settings: Settings) -> frozenset[str]:
        return frozenset(part_rates(settings))

    # ---- what learns

    def _freeze_what_text_never_reaches(self) -> None:
        """The last layers of an encoder whose earlier layer is taken as the condition cannot learn."""
        text = [module for name, module in self._learning.items() if name != "unet"]
        settings = TextSettings(clip_skip=self._clip_skip)
        with torch.enable_grad():
            tokens = self._family.tokenize([""], settings)
            condition = self._family.encode(self._parts.text_encoders, tokens, settings)
        outputs = [condition.hidden_BTD] + ([] if condition.pooled_BP is None else [condition.pooled_BP])
        reached = reached_leaves(outputs)
        for module in text:
            for parameter in module.parameters():
                parameter.requires_grad_(id(parameter) in reached)

    def _make_groups(self, rates: Rates, block_rates: tuple[float, ...] | None) -> Iterable[dict[str, Any]]:
        names = {"unet": "unet", "text_encoder": "text_encoder1", "text_encoder_2": "text_encoder2"}
        if "unet" in rates:
            if block_rates:
                yield from self._block_groups(block_rates)
            else:
                yield _group(names["unet"], rates["unet"], self._parts.unet.parameters())
        for part, name in names.items():
            if part != "unet" and part in rates:
                yield _group(name, rates[part], self._learning[part].parameters())

    def _block_groups(self, block_rates: tuple[float, ...]) -> Iterable[dict[str, Any]]:
        blocks = self._family.unet_parameter_blocks(self._parts)
        members: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self._parts.unet.named_parameters():
            members.setdefault(blocks[name], []).append(parameter)
        for block, rate in enumerate(block_rates):
            if rate > 0:
                yield _group(f"block{block}", rate, members[block])

    def _freeze_all_but(self, groups: list[dict[str, Any]]) -> None:
        kept = {id(parameter) for group in groups for parameter in group["params"]}
        if not kept:
            raise UserError("nothing to train: every learning rate is 0")
        for parameter in self.module.parameters():
            parameter.requires_grad_(id(parameter) in kept)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self._groups

    # ---- the run

    def on_step_start(self, step: int) -> None:
        """From the step of ``--stop_text_encoder_training`` on the text encoder gets no gradient, so it stays."""
        if self._text_stops_at is None or step < self._text_stops_at:
            return
        text = [module for name, module in self._learning.items() if name != "unet"]
        if any(parameter.requires_grad for module in text for parameter in module.parameters()):
            logger.info("from step %d on the text encoder learns no more", self._text_stops_at)
        for module in text:
            module.requires_grad_(False)

    def why_no_multiplier(self) -> str:
        return "is for networks, the model itself has no strength"

    def enable_gradient_checkpointing(self) -> None:
        """All that learns are models, which are switched as such."""

    # ---- what is written

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], counters: Mapping[str, int]) -> None:
        parts = self._parts_to_save()
        if self.artifact.suffix:
            self._family.save_checkpoint(parts, Path(path), dtype, metadata, counters)
        else:
            self._family.save_diffusers(parts, Path(path), dtype)

    def _parts_to_save(self) -> ModelParts:
        """The model with its frozen parts as the base model has them, not as they were rounded for the training."""
        trained = next(self.module.parameters()).dtype
        rounded = [
            name
            for name, module in self._parts.by_name().items()
            if name not in self._learning and next(module.parameters()).dtype != trained
        ]
        if not rounded:
            return self._parts
        try:
            return self._family.reload(self._parts, rounded, trained)
        except (UserError, OSError) as error:
            logger.warning("the frozen parts (%s) are saved as they are in memory: %s", ", ".join(rounded), error)
            return self._parts

    def saved_numbers(self) -> int:
        return sum(parameter.numel() for module in self._parts.modules() for parameter in module.parameters())

    def check(self, path: Path) -> list[str]:
        return check_written(path, self._parts.spec)


def part_rates(settings: Settings) -> dict[str, float]:
    """The learning rate of each part of the model that learns, by the part's name."""
    base = settings[OptimizerOptions].learning_rate
    rates = {"unet": base}
    if _trains_text(settings):
        options = settings.script.specs()
        for part, option in TEXT_RATES:
            if option in options:
                own = settings.value_of(option)
                rates[part] = base if own is None else own
    return {part: rate for part, rate in rates.items() if rate > 0}


def _trains_text(settings: Settings) -> bool:
    """True if text encoders learn at all. DreamBooth trains its own unless a step of 0 or less stops it."""
    if DreamBoothOptions in settings:
        stop = settings[DreamBoothOptions].stop_text_encoder_training
        return stop is None or stop > 0
    return bool(settings.value_of("train_text_encoder"))


def reached_leaves(outputs: Iterable[Tensor]) -> set[int]:
    """``id`` of every leaf tensor that a backward pass from the outputs would reach; nothing is computed."""
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    leaves: set[int] = set()
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)  # only nodes that accumulate a leaf's gradient have one
        if variable is not None:
            leaves.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return leaves


def _group(name: str, rate: float, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    return {"params": [p for p in parameters if p.requires_grad], "lr": rate, "lr_name": name}


def _suffix(options: ModelFileOptions, parts: ModelParts) -> str:
    """The suffix of saved models; none for a Diffusers folder. Absent options keep the form of the base model."""
    form = options.save_model_as
    if form is None:
        if not parts.source.path.is_file():
            form = "diffusers"
        else:
            form = "safetensors" if options.use_safetensors or is_safetensors(parts.source.path) else "ckpt"
    return "" if form.startswith("diffusers") else f".{form}"
