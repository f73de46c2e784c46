"""Text encoders at work: rows of ids -> hidden states, joined, with clip skip and weights; and a memory for them.

Shapes: B captions, N rows, T = 77 ids of a row, L = 75 N + 2 positions of the joined caption, D width, P pooled width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.log import UserError
from library.text.tokens import Normalize, TokenRows


def encode_rows(encoder: nn.Module, ids_RT: Tensor, clip_skip: int | None = None, final_norm: bool = True) -> Tensor:
    """Hidden states of single rows (R, T, D), in the encoder's dtype.

    ``clip_skip`` absent: the encoder's final output. k: hidden state number -k, then (``final_norm``) the final layer
    norm; so 1 equals absent. ``encoder`` is transformers' CLIPTextModel or CLIPTextModelWithProjection, of any width.
    Raises UserError for a k that is more than there are.
    """
    body: Any = _body(encoder)
    if clip_skip is None and final_norm:
        return body(input_ids=ids_RT).last_hidden_state
    states: tuple[Tensor, ...] = body(input_ids=ids_RT, output_hidden_states=True).hidden_states
    skip = clip_skip or 1
    if skip > len(states):
        raise UserError(f"--clip_skip {skip}: this text encoder has {len(states) - 1} layers; choose a smaller number")
    return body.final_layer_norm(states[-skip]) if final_norm else states[-skip]


def _body(encoder: Any) -> Any:
    """The module with the layers and the final norm: the model itself, or what its ``text_model`` holds."""
    return getattr(encoder, "text_model", encoder)


def join_rows(hidden_RTD: Tensor, rows: int) -> Tensor:
    """(B * N, T, D) -> (B, 75 N + 2, D): the first state, the inner states of each row, the very last state."""
    if rows == 1:
        return hidden_RTD
    hidden_BNTD = hidden_RTD.unflatten(0, (-1, rows))
    inner_BLD = hidden_BNTD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden_BNTD[:, 0, :1], inner_BLD, hidden_BNTD[:, -1, -1:]], dim=1)


def apply_weights(hidden_BLD: Tensor, weights_BL: Tensor, normalize: Normalize = "original") -> Tensor:
    """Multiply positions by their weights, then rescale each caption so that its mean is what it was.

    ``normalize`` "abs" keeps the mean of absolute values instead, "none" rescales nothing. Means are taken in float32
    over positions and channels. Where the mean is too near 0 to carry a scale, or its sign turns, nothing is rescaled:
    the quotient of two such means would be noise.
    """
    hidden = hidden_BLD.float()
    weighted = hidden * weights_BL.to(hidden).unsqueeze(-1)
    if normalize == "none":
        return weighted.to(hidden_BLD.dtype)
    if normalize == "abs":
        sizes = hidden.abs().mean(dim=(1, 2), keepdim=True), weighted.abs().mean(dim=(1, 2), keepdim=True)
        return (weighted * sizes[0] / sizes[1].clamp(min=1e-12)).to(hidden_BLD.dtype)
    before, after = hidden.mean(dim=(1, 2), keepdim=True), weighted.mean(dim=(1, 2), keepdim=True)
    carries_scale = (before * after > 0) & (after.abs() > 1e-3 * weighted.abs().mean(dim=(1, 2), keepdim=True))
    factor = torch.where(carries_scale, before / torch.where(carries_scale, after, 1.0), 1.0)
    return (weighted * factor).to(hidden_BLD.dtype)


def encode_tokens(
    encoder: nn.Module, tokens: TokenRows, clip_skip: int | None = None, final_norm: bool = True
) -> Tensor:
    """A batch of captions with their weights -> (B, 75 N + 2, D). The layout is the same with and without weights.

    ``clip_skip``, ``final_norm``: as in `encode_rows`.
    """
    hidden_RTD = encode_rows(encoder, tokens.ids_BNT.flatten(0, 1), clip_skip, final_norm)
    hidden_BLD = join_rows(hidden_RTD, tokens.ids_BNT.shape[1])
    return hidden_BLD if tokens.weights_BL is None else apply_weights(hidden_BLD, tokens.weights_BL, tokens.normalize)


def pooled_at_first_eos(last_hidden_BTD: Tensor, ids_BT: Tensor, eos_id: int, projection: nn.Module) -> Tensor:
    """The final (normed) state at the first EOS of the first row, times the projection: (B, P).

    Position 0 where there is no EOS. The library's own pooling takes the largest id in some configurations, which is
    wrong once tokens were added.
    """
    first_B = (ids_BT == eos_id).int().argmax(dim=-1)
    state_BD = last_hidden_BTD[torch.arange(len(ids_BT), device=ids_BT.device), first_B]
    return projection(state_BD)


Encoded = tuple[Tensor | None, ...]


class ConditionCache:
    """Remembers what a frozen text encoder made of a caption, on the device; the least recently used are dropped.

    ``encode`` gets captions and gives tensors with the captions along axis 0 (None where the family has none).
    A caption that is not known is encoded alone, so its numbers do not depend on its neighbours in the batch or on what
    the cache held before: a resumed run sees the same values. Where captions change at every visit there is nothing to
    remember: call the encoder itself there.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Encoded], max_bytes: int = 512 * 1024**2) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[str, Encoded] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Encoded:
        """The condition of a batch, stacked in its order."""
        parts = [self._condition(caption) for caption in captions]
        return tuple(_stack([part[index] for part in parts]) for index in range(len(parts[0])))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, caption: str) -> bool:
        return caption in self._known

    def _condition(self, caption: str) -> Encoded:
        known = self._known.get(caption)
        if known is not None:
            self._known.move_to_end(caption)
            return known
        with torch.no_grad():
            encoded = self._encode([caption])
        self._known[caption] = encoded
        self._bytes += _size_bytes(encoded)
        while self._bytes > self._max_bytes and len(self._known) > 1:
            self._bytes -= _size_bytes(self._known.popitem(last=False)[1])
        return encoded


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _size_bytes(encoded: Encoded) -> int:
    return sum(tensor.nbytes for tensor in encoded if tensor is not None)
