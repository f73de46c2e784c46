"""SD1 and SD2 with words that mean something else to each cross-attention layer (extended textual inversion).

Shape legend: B samples, S cross-attention layers, N token rows, T tokens, L positions of the joined caption, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from library.families.base import TextCondition, TextSettings, TokenBatch
from library.families.sd import SdFamily
from library.text.encode import encode_tokens
from library.text.tokens import TokenRows, tokenize


class LayeredSdFamily(SdFamily):
    """The family with a tokenizer for each cross-attention layer. A word must become equally many ids in all of them.

    Token batches hold an entry for each layer. The U-Net must be able to choose, see
    `library.models.layer_texts.let_layers_choose`.
    """

    def __init__(self, base: SdFamily, tokenizers: Sequence[Any]) -> None:
        super().__init__(base.v2)
        self.tokenizer = tokenizers[0]
        self._by_layer = tuple(tokenizers)

    def tokenize(self, captions: Sequence[str], settings: TextSettings) -> TokenBatch:
        return TokenBatch(tuple(tokenize(tokenizer, captions, settings) for tokenizer in self._by_layer))

    def encode(self, text_encoders: Sequence[nn.Module], tokens: TokenBatch, settings: TextSettings) -> TextCondition:
        """The condition for each layer; for texts without such words the plain one."""
        first, *others = tokens.rows
        if all(torch.equal(first.ids_BNT, other.ids_BNT) for other in others):
            return super().encode(text_encoders, tokens, settings)
        (encoder,) = text_encoders
        weights = [rows.weights_BL for rows in tokens.rows if rows.weights_BL is not None]
        together = TokenRows(
            torch.cat([rows.ids_BNT for rows in tokens.rows]), torch.cat(weights) if weights else None, first.normalize
        )
        hidden = encode_tokens(encoder, together.to(next(encoder.parameters()).device), settings.clip_skip)
        by_layer_BSTD = hidden.unflatten(0, (len(tokens.rows), -1)).transpose(0, 1)
        return TextCondition(by_layer_BSTD[:, 0], by_layer_BSTD=by_layer_BSTD)
