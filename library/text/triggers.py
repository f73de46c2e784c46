"""Words that stand for vectors of their own (textual inversion): a tokenizer that knows them, and the vectors' place.
Vectors that stay as they are become part of the encoder's table; vectors that learn are looked up beside it.

A word is known only where it stands alone and is written exactly so. Neither the tokenizer nor the vocabulary that it
was made from is changed.

Shapes: V vectors of a word, D width of a text encoder, S sets of vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class TriggerTokenizer:
    """A copy of a CLIP tokenizer with added words, each of which becomes several ids.

    It has what encoding texts asks of a tokenizer: its marks, and calling it with texts.
    """

    def __init__(self, tokenizer: CLIPTokenizer, meanings: Mapping[str, Sequence[int]]) -> None:
        from tokenizers import AddedToken

        self._tokenizer = copy.deepcopy(tokenizer)
        words = [AddedToken(word, single_word=True, normalized=False) for word in meanings]
        self._tokenizer.add_tokens(cast(Any, words))
        self._meanings = {self._id_of(word): list(ids) for word, ids in meanings.items()}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )

    def with_meanings(self, meanings: Mapping[str, Sequence[int]]) -> TriggerTokenizer:
        """The same words, standing for other ids where these are given."""
        other = copy.copy(self)
        other._meanings = {**self._meanings, **{self._id_of(word): list(ids) for word, ids in meanings.items()}}
        return other

    def _id_of(self, word: str) -> int:
        return cast(int, self._tokenizer.convert_tokens_to_ids(word))

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        """Ids of texts under ``input_ids``."""
        rows = self._tokenizer(list(texts), **options)["input_ids"]
        return {"input_ids": [self._meant(row) for row in cast("list[list[int]]", rows)]}

    def _meant(self, row: Sequence[int]) -> list[int]:
        return [meant for index in row for meant in self._meanings.get(index, (index,))]


def is_taken(tokenizer: CLIPTokenizer, word: str) -> bool:
    """True for a word that the vocabulary holds in one piece: it could not be told from an added one."""
    vocabulary = tokenizer.get_vocab()
    return word in vocabulary or f"{word}</w>" in vocabulary


def add_vectors(encoder: nn.Module, vectors_VD: Tensor) -> int:
    """Put rows at the end of a text encoder's token embedding; returns the id of the first.

    Raises ValueError if their width is not the encoder's.
    """
    embedding: nn.Embedding = cast(Any, encoder).get_input_embeddings()
    first, width = embedding.weight.shape
    if vectors_VD.dim() != 2 or vectors_VD.shape[1] != width:
        raise ValueError(f"vectors of width {vectors_VD.shape[-1]} for a text encoder of width {width}")
    rows = torch.cat([embedding.weight.detach(), vectors_VD.to(embedding.weight)])
    embedding.weight = nn.Parameter(rows, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(rows)
    return first


class GrownEmbedding(nn.Embedding):
    """A token embedding whose ids from ``num_embeddings`` on are rows of another, small tensor.

    So what learns is that tensor alone: the vocabulary gets no gradient, no decay and no optimizer state. The tensor
    belongs to whoever trains it: it is no parameter of this module. Known ids give exactly what they gave before.
    """

    def __init__(self, plain: nn.Embedding, rows_SVD: nn.Parameter) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, _weight=plain.weight)
        self.weight = plain.weight
        self._rows = (rows_SVD,)  # the tuple hides it from nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Vectors (..., D) of ids (...)."""
        is_new = input >= self.num_embeddings
        known = super().forward(input.masked_fill(is_new, 0))
        new = F.embedding((input - self.num_embeddings).clamp(min=0), self._rows[0].flatten(0, -2))
        return torch.where(is_new.unsqueeze(-1), new.to(known.dtype), known)


def let_learn(encoder: nn.Module, rows_SVD: nn.Parameter) -> int:
    """Give a text encoder's tokens further rows that learn; returns the id of the first.

    Raises ValueError if their width is not the encoder's.
    """
    model = cast(Any, encoder)
    plain: nn.Embedding = model.get_input_embeddings()
    if rows_SVD.shape[-1] != plain.embedding_dim:
        raise ValueError(f"vectors of width {rows_SVD.shape[-1]} for a text encoder of width {plain.embedding_dim}")
    model.set_input_embeddings(GrownEmbedding(plain, rows_SVD))
    return plain.num_embeddings
