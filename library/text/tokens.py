"""Token rows: how a caption becomes rows of 77 ids, with a weight per position if asked. Pure functions over ids.

Shapes: B captions, N rows of a caption, T = 77 ids of a row, L = 75 N + 2 positions of the joined caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from library.text.emphasis import BREAK, Piece, parse_emphasis
from library.text.tokenizer import MAX_LENGTH, clip_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK_TOKENS = MAX_LENGTH - 2  # what is left of a row between its two marks
Normalize = Literal["original", "none", "abs"]


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How captions become encoder input; part of the mathematics of a run.

    ``max_token_length`` counts tokens without the two marks: None (= 75), 75, 150 or 225. ``weighted_captions``
    understands ``(text:1.2)``; ``breaks`` also the word BREAK. ``shrink`` uses only as many rows as the longest text of
    the batch needs (previews); without it the number of rows is always the same (training). ``pad`` False, with
    ``shrink``: a single row ends with the longest text of the batch and has fewer than 77 ids. ``normalize``: what
    weights leave as it was: the mean, the mean of absolute values, or nothing.
    """

    max_token_length: int | None = None
    clip_skip: int | None = None
    weighted_captions: bool = False
    breaks: bool = False
    shrink: bool = False
    pad: bool = True
    normalize: Normalize = "original"

    @property
    def max_rows(self) -> int:
        """Rows that ``max_token_length`` allows."""
        return max(1, (self.max_token_length or CHUNK_TOKENS) // CHUNK_TOKENS)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The marks and the row length."""

    bos_id: int
    eos_id: int
    pad_id: int
    row_length: int = MAX_LENGTH

    @property
    def content(self) -> int:
        """Ids of a row between its two marks."""
        return self.row_length - 2


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Captions as rows of ids for one text encoder. ``weights_BL``: 1 at marks and padding; None if all are 1.

    ``normalize``: as in `TextSettings`.
    """

    ids_BNT: Tensor
    weights_BL: Tensor | None = None
    normalize: Normalize = "original"

    def to(self, device: torch.device | str) -> TokenRows:
        """The same on a device."""
        weights = None if self.weights_BL is None else self.weights_BL.to(device)
        return TokenRows(self.ids_BNT.to(device), weights, self.normalize)


def token_rows(ids: Sequence[int], rows: int, rules: TokenRules) -> list[list[int]]:
    """Ids without marks -> ``rows`` rows of ``row_length`` ids; what does not fit is cut off.

    One row: BOS, ids, EOS, padding. More: that long row is cut in stretches of ``content`` ids, each between BOS and
    the long row's last id. Where padding is not EOS (SD2), a full row gets EOS as its last id and a row that would
    begin with padding gets EOS there. The splitting knows nothing of words.
    """
    length = rows * rules.content + 2
    line = [rules.bos_id, *ids[: rows * rules.content], rules.eos_id]
    line += [rules.pad_id] * (length - len(line))
    if rows == 1:
        return [line]
    result: list[list[int]] = []
    for start in range(1, length - 1, rules.content):
        row = [line[0], *line[start : start + rules.content], line[-1]]
        if rules.pad_id != rules.eos_id:
            if row[-2] not in (rules.eos_id, rules.pad_id):
                row[-1] = rules.eos_id
            if row[1] == rules.pad_id:
                row[1] = rules.eos_id
        result.append(row)
    return result


def fill_to_row(ids: list[int], weights: list[float], rules: TokenRules) -> None:
    """Fill up the current row in place (BREAK): the text after it begins a new row. A full row is left as it is."""
    missing = -len(ids) % rules.content
    if missing:
        ids += [rules.eos_id] + [rules.pad_id] * (missing - 1)
        weights += [1.0] * missing


def rules_of(tokenizer: Any) -> TokenRules:
    """The rules of a tokenizer: its marks and its padding."""
    return TokenRules(int(tokenizer.bos_token_id), int(tokenizer.eos_token_id), int(tokenizer.pad_token_id))


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, without marks, not cut."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def count_tokens(captions: Sequence[str]) -> list[int]:
    """Tokens of each caption without the marks, by the built-in tokenizer."""
    return [len(ids) for ids in token_ids(clip_tokenizer(), captions)]


def tokenize(tokenizer: Any, captions: Sequence[str], settings: TextSettings) -> TokenRows:
    """Captions -> rows of ids and, with ``settings.weighted_captions``, weights. Tensors are on the CPU, ids int64."""
    import torch

    rules = rules_of(tokenizer)
    if settings.weighted_captions:
        lines = [_weighted_ids(tokenizer, parse_emphasis(text, settings.breaks), rules) for text in captions]
    else:
        lines = [(ids, [1.0] * len(ids)) for ids in token_ids(tokenizer, captions)]
    rows = settings.max_rows
    longest = max((len(ids) for ids, _ in lines), default=0)
    if settings.shrink:
        rows = max(1, min(rows, -(-longest // rules.content)))
    if rows == 1 and not settings.pad:
        rules = replace(rules, row_length=min(longest, rules.content) + 2)
    ids_BNT = torch.tensor([token_rows(ids, rows, rules) for ids, _ in lines], dtype=torch.int64)
    if all(weight == 1.0 for _, weights in lines for weight in weights):
        return TokenRows(ids_BNT)
    weights_BL = torch.ones(len(lines), rows * rules.content + 2)
    for index, (_, weights) in enumerate(lines):
        kept = torch.tensor(weights[: rows * rules.content])
        weights_BL[index, 1 : 1 + len(kept)] = kept
    return TokenRows(ids_BNT, weights_BL, settings.normalize)


def _weighted_ids(tokenizer: Any, pieces: Sequence[Piece], rules: TokenRules) -> tuple[list[int], list[float]]:
    """Ids and one weight per id; each piece is tokenised on its own."""
    ids: list[int] = []
    weights: list[float] = []
    for piece, piece_ids in zip(pieces, token_ids(tokenizer, [piece.text for piece in pieces]), strict=True):
        if piece is BREAK:
            fill_to_row(ids, weights, rules)
        else:
            ids += piece_ids
            weights += [piece.weight] * len(piece_ids)
    return ids, weights
