"""Cross-attention layers of a U-Net that each hear a text of their own.

A. Voynov et al., "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv:2303.09522.

Shapes: B samples, S cross-attention layers, T tokens, D context width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_LAYER_ORDER = ("down_blocks", "mid_block", "up_blocks")


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    """The cross-attention layers in the order in which a picture goes through them: down, middle, up."""
    found = [(path, module) for path, module in unet.named_modules() if path.endswith(".attn2")]
    return [module for start in _LAYER_ORDER for path, module in found if path.startswith(start)]


def let_layers_choose(unet: nn.Module) -> None:
    """From now on the U-Net also takes a text for each layer (B, S, T, D), of which each layer picks its own.

    Texts that are the same for all layers (B, T, D) act as before. The choice is made inside the layers, so it holds
    as well where activations are computed again for the backward pass.
    """
    for index, layer in enumerate(cross_attentions(unet)):
        layer.register_forward_pre_hook(_choosing(index), with_kwargs=True)


def _choosing(index: int) -> Any:
    def hook(
        _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        texts: Tensor | None = named.get("encoder_hidden_states")
        if texts is None or texts.dim() != 4:
            return None
        return inputs, {**named, "encoder_hidden_states": texts[:, index]}

    return hook
