"""Words that stand for vectors (textual inversion), and the files that hold them.

R. Gal et al., "An Image is Worth One Word", arXiv:2208.01618. With one vector for each cross-attention layer: A. Voynov
et al., "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv:2303.09522.

Shapes: V vectors of a word, D width of a text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoint.io import open_model_file, save_pickle, save_safetensors
from library.log import UserError
from library.text.triggers import is_taken

if TYPE_CHECKING:
    import torch
    from torch import Tensor

XTI_LAYERS = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)
SINGLE_KEY = "emb_params"
SDXL_KEYS = ("clip_l", "clip_g")


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors (V, D) for each text encoder, or (``by_layer``) for each cross-attention layer.

    ``file`` is where they came from, for messages.
    """

    word: str
    file: str
    vectors: tuple[Tensor, ...]
    by_layer: bool = False

    @property
    def words(self) -> list[str]:
        """The word itself stands for all vectors; with a number behind it, from 1 on, for a single one of them."""
        return [self.word, *(f"{self.word}{index}" for index in range(1, len(self.vectors[0])))]

    def meanings(self, first_id: int) -> dict[str, list[int]]:
        """The ids that the words stand for, if the vectors have the ids from ``first_id`` on."""
        ids = [first_id + index for index in range(len(self.vectors[0]))]
        word, *others = self.words
        return {word: ids, **{other: [index] for other, index in zip(others, ids[1:], strict=True)}}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The vectors under the names that they have in files."""
        if self.by_layer:
            return dict(zip(XTI_LAYERS, self.vectors, strict=True))
        names = SDXL_KEYS if len(self.vectors) > 1 else (SINGLE_KEY,)
        return dict(zip(names, self.vectors, strict=True))


def require_own_words(tokenizers: Sequence[Any], found: Sequence[Embedding], advice: str) -> None:
    """Refuse words that could not be told from one another or from those of the vocabulary. Raises UserError."""
    owner: dict[str, str] = {}
    for embedding in found:
        for word in embedding.words:
            if word in owner:
                raise UserError(f"{embedding.file}: the word {word} is that of {owner[word]} already; {advice}")
            if any(is_taken(tokenizer, word) for tokenizer in tokenizers):
                raise UserError(f"{embedding.file}: {word} is a word that the model knows; {advice}")
            owner[word] = embedding.file


# ---- reading


def read_embedding(file: str, family: str) -> Embedding:
    """An embedding file for a family (its name): ``clip_l`` and ``clip_g`` for SDXL, else the first tensor in it.

    The word is the file's stem. Raises UserError.
    """
    tensors = _tensors(file)
    if family == "sdxl":
        if any(key not in tensors for key in SDXL_KEYS):
            raise UserError(f"{file} has no clip_l and clip_g, it was not made for SDXL")
        vectors = tuple(tensors[key] for key in SDXL_KEYS)
        if len(vectors[0]) != len(vectors[1]):
            raise UserError(f"{file}: {len(vectors[0])} vectors in clip_l and {len(vectors[1])} in clip_g")
    elif set(tensors) == set(SDXL_KEYS):
        raise UserError(f"{file} was made for SDXL")
    elif set(XTI_LAYERS) <= set(tensors):
        raise UserError(f"{file} has vectors for each layer: give it to --XTI_embeddings")
    else:
        vectors = (next(iter(tensors.values())),)
    return Embedding(Path(file).stem, file, vectors)


def read_layer_embedding(file: str, family: str) -> Embedding:
    """A file with vectors for each of the 16 cross-attention layers of SD 1.x and 2.x. Raises UserError."""
    if family == "sdxl":
        raise UserError(f"{file}: vectors for each layer are for SD 1.x and 2.x")
    tensors = _tensors(file)
    if set(tensors) != set(XTI_LAYERS):
        raise UserError(
            f"{file} has no vectors for each layer: must have exactly {', '.join(XTI_LAYERS)}; has {_some(tensors)}"
        )
    vectors = tuple(tensors[name] for name in XTI_LAYERS)
    if len({len(rows) for rows in vectors}) > 1:
        raise UserError(f"{file}: its layers have different numbers of vectors")
    return Embedding(Path(file).stem, file, vectors, by_layer=True)


def _tensors(file: str) -> dict[str, Tensor]:
    """All tensors as (V, D)."""
    with open_model_file(file) as opened:
        tensors = {key: opened.tensor(key) for key in opened.infos}
    tensors = {key: tensor[None] if tensor.dim() == 1 else tensor for key, tensor in tensors.items()}
    if not tensors or any(tensor.dim() != 2 or not tensor.is_floating_point() for tensor in tensors.values()):
        raise UserError(f"{file} holds no embedding (rows of numbers); it has {_some(tensors)}")
    return tensors


def _some(tensors: Mapping[str, Tensor]) -> str:
    shapes = [f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items()]
    return ", ".join(shapes[:3]) + (" ..." if len(shapes) > 3 else "") or "no tensor"


# ---- writing


def write_embedding(path: Path, embedding: Embedding, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file or, under any other suffix, a pickled table of tensors, where metadata have no place.

    ``dtype`` is what the vectors are cast to (None: as they are). Raises UserError (WriteError).
    """
    if path.suffix == ".safetensors":
        save_safetensors(path, embedding.tensors, metadata, dtype)
    else:
        save_pickle(path, embedding.tensors, dtype)
