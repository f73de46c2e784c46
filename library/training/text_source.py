"""Text conditions of a batch for the training step: encoded each time while text learns, remembered while it is
frozen, or taken from a cache that was filled ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.data.text_cache import TextStore
from library.families.base import ModelFamily, ModelParts, TextCondition, TextSettings
from library.options import ModelOptions
from library.text.encode import ConditionCache
from library.training.trainable import Trainable


def text_settings(options: ModelOptions, family: ModelFamily) -> TextSettings:
    """How the captions of a training become encoder input."""
    clip_skip = options.clip_skip if family.trains_with_clip_skip else None
    return TextSettings(options.max_token_length, clip_skip, options.weighted_captions)


def text_learns(family: ModelFamily, parts: ModelParts, trainable: Trainable, dtype: torch.dtype) -> bool:
    """True if a gradient reaches something that learns through the text condition: found by encoding nothing, once."""
    if not trainable.may_train_text:
        return False
    settings = TextSettings()
    device = next(parts.text_encoders[0].parameters()).device
    was_training = trainable.module.training
    trainable.module.eval()
    with torch.enable_grad(), trainable.precision(device, dtype):
        condition = family.encode(parts.text_encoders, family.tokenize([""], settings), settings)
    trainable.module.train(was_training)
    return condition.hidden_BTD.requires_grad


class CachedTextSource:
    """Captions -> condition in ``dtype``, of what was made ahead; the encoders are not needed."""

    def __init__(self, store: TextStore, *, device: torch.device, dtype: torch.dtype) -> None:
        self._store = store
        self._device = device
        self._dtype = dtype

    def __call__(self, captions: Sequence[str]) -> TextCondition:
        known = {caption: self._store.load(caption) for caption in dict.fromkeys(captions)}
        outputs = [known[caption] for caption in captions]
        pooled = [one.pooled_P for one in outputs if one.pooled_P is not None]
        hidden_BTD = torch.stack([one.hidden_TD for one in outputs])
        return TextCondition(hidden_BTD, torch.stack(pooled) if pooled else None).to(self._device, self._dtype)


class TextSource:
    """Captions -> condition in ``dtype``. With ``learns`` gradients reach the encoders and nothing is remembered."""

    def __init__(
        self,
        family: ModelFamily,
        parts: ModelParts,
        settings: TextSettings,
        *,
        learns: bool,
        captions_repeat: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._family = family
        self._encoders = list(parts.text_encoders)
        self._settings = settings
        self._learns = learns
        self._device = device
        self._dtype = dtype
        self._cache = ConditionCache(self._encode_frozen) if captions_repeat and not learns else None

    def __call__(self, captions: Sequence[str]) -> TextCondition:
        if self._cache is not None:
            hidden_BTD, pooled_BP = self._cache(captions)
            assert hidden_BTD is not None
            return TextCondition(hidden_BTD, pooled_BP)
        with torch.set_grad_enabled(self._learns and torch.is_grad_enabled()):
            return self._encode(captions)

    def _encode(self, captions: Sequence[str]) -> TextCondition:
        tokens = self._family.tokenize(list(captions), self._settings)
        return self._family.encode(self._encoders, tokens, self._settings).to(self._device, self._dtype)

    def _encode_frozen(self, captions: Sequence[str]) -> tuple[Tensor | None, ...]:
        condition = self._encode(captions)
        return condition.hidden_BTD, condition.pooled_BP
