"""A model as network plug-ins see it: under the paths and class names that they look for. Its layers are shared."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


class PluginView(nn.Module):
    """A module around a model, or around its layers; what plug-ins ask of a model, it answers as the model does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # the tuple hides it from nn.Module
        self.config = cast(Any, model).config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return next(self.parameters()).dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self._model[0](*args, **kwargs)


class TextEncoderView(PluginView):
    """A text encoder under the attribute ``text_model``: network plug-ins derive their names from that path."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self.text_model = encoder

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return cast(Any, self.text_model).get_input_embeddings()


def text_encoder_view(encoder: nn.Module) -> nn.Module:
    """The encoder with a ``text_model`` level in its paths, whether the library's class has one or not."""
    has_level = any(name == "text_model" for name, _ in encoder.named_children())
    return encoder if has_level else TextEncoderView(encoder)


_PLUGIN_CLASS_NAMES = {"Attention": "CrossAttention", "TimestepEmbedding": "TimeEmbedding"}


def name_for_plugins(unet: nn.Module) -> None:
    """Give blocks of the U-Net the class names that plug-ins of the common protocol look for; nothing else changes.

    LyCORIS finds attention as ``CrossAttention``. It lists the time embedding's two layers by name and, since version
    4, by the class ``TimestepEmbedding`` of another architecture: a U-Net with both would get those layers twice.
    """
    renamed: dict[type[nn.Module], type[nn.Module]] = {}
    for module in unet.modules():
        original = type(module)
        name = _PLUGIN_CLASS_NAMES.get(original.__name__)
        if name is not None:
            module.__class__ = renamed.setdefault(original, type(name, (original,), {}))
