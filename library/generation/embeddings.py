"""Textual inversion in generation: words of the prompts that stand for vectors from files.

R. Gal et al., "An Image is Worth One Word", arXiv:2208.01618. With one vector for each cross-attention layer: A. Voynov
et al., "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv:2303.09522.

Shapes: V vectors of a word, D width of a text encoder, B rows of text, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.checkpoint.io import open_model_file
from library.families.base import ModelFamily
from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.log import UserError
from library.options.generation import PromptOptions
from library.text.triggers import TriggerTokenizer, add_vectors, is_taken

logger = logging.getLogger(__name__)

XTI_LAYERS = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)
_SDXL_KEYS = ("clip_l", "clip_g")
_LAYER_ORDER = ("down_blocks", "mid_block", "up_blocks")


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors (V, D) for each text encoder, or (``by_layer``) for each cross-attention layer."""

    word: str
    file: str
    vectors: tuple[Tensor, ...]
    by_layer: bool = False

    @property
    def words(self) -> list[str]:
        """The word itself stands for all vectors; with a number behind it, from 1 on, for a single one of them."""
        return [self.word, *(f"{self.word}{index}" for index in range(1, len(self.vectors[0])))]


def attach_embeddings(engine: Engine, options: PromptOptions) -> tuple[Embedding, ...]:
    """Teach the engine's prompts the words of the options' files. Raises UserError.

    The engine gets a family of its own with other tokenizers, and its text encoders more tokens.
    """
    plain = [read_embedding(file, engine.family) for file in options.textual_inversion_embeddings or ()]
    by_layer = [read_layer_embedding(file, engine.family) for file in options.XTI_embeddings or ()]
    found = [*plain, *by_layer]
    if not found:
        return ()
    _require_own_words(engine.family, found)
    tokenizers: list[TriggerTokenizer] = []
    encoders = zip(engine.parts.text_encoders, engine.family.tokenizers, strict=True)
    for index, (encoder, tokenizer) in enumerate(encoders):
        meanings: dict[str, list[int]] = {}
        for embedding in plain:
            ids = _add(encoder, embedding.vectors[index], embedding.file)
            meanings |= _meanings(embedding, ids)
        layers = [{key: list(ids) for key, ids in meanings.items()} for _ in XTI_LAYERS]
        for embedding in by_layer:
            for own, vectors_VD in zip(layers, embedding.vectors, strict=True):
                own |= _meanings(embedding, _add(encoder, vectors_VD, embedding.file))
        tokenizers.append(TriggerTokenizer(tokenizer, layers[0] if by_layer else meanings))
        if by_layer:
            engine.extensions.append(LayerTexts(engine, tokenizers[0], layers, by_layer).extension)
    engine.family = engine.family.with_tokenizers(tokenizers)
    for embedding in found:
        logger.info("%s stands for %d vectors (%s)", embedding.word, len(embedding.vectors[0]), embedding.file)
    return tuple(found)


def _add(encoder: nn.Module, vectors_VD: Tensor, file: str) -> list[int]:
    try:
        first = add_vectors(encoder, vectors_VD)
    except ValueError as error:
        raise UserError(f"{file}: {error}; it was made for another kind of model") from error
    return list(range(first, first + len(vectors_VD)))


def _meanings(embedding: Embedding, ids: Sequence[int]) -> dict[str, list[int]]:
    first, *others = embedding.words
    return {first: list(ids), **{word: [index] for word, index in zip(others, ids[1:], strict=True)}}


def _require_own_words(family: ModelFamily, found: Sequence[Embedding]) -> None:
    owner: dict[str, str] = {}
    for embedding in found:
        for word in embedding.words:
            if word in owner:
                raise UserError(f"{embedding.file}: the word {word} is that of {owner[word]} already; rename the file")
            if any(is_taken(tokenizer, word) for tokenizer in family.tokenizers):
                raise UserError(f"{embedding.file}: {word} is a word that the model knows; rename the file")
            owner[word] = embedding.file


# ---- files


def read_embedding(file: str, family: ModelFamily) -> Embedding:
    """An embedding file: ``clip_l`` and ``clip_g`` for SDXL, else the first tensor in it. Raises UserError."""
    tensors = _tensors(file)
    if family.name == "sdxl":
        if any(key not in tensors for key in _SDXL_KEYS):
            raise UserError(f"{file} has no clip_l and clip_g, it was not made for SDXL")
        vectors = tuple(tensors[key] for key in _SDXL_KEYS)
        if len(vectors[0]) != len(vectors[1]):
            raise UserError(f"{file}: {len(vectors[0])} vectors in clip_l and {len(vectors[1])} in clip_g")
    elif set(tensors) == set(_SDXL_KEYS):
        raise UserError(f"{file} was made for SDXL")
    elif set(XTI_LAYERS) <= set(tensors):
        raise UserError(f"{file} has vectors for each layer: give it to --XTI_embeddings")
    else:
        vectors = (next(iter(tensors.values())),)
    return Embedding(_word_of(file), file, vectors)


def read_layer_embedding(file: str, family: ModelFamily) -> Embedding:
    """A file with vectors for each of the 16 cross-attention layers of SD 1.x and 2.x. Raises UserError."""
    if family.name == "sdxl":
        raise UserError(f"--XTI_embeddings {file}: is for SD 1.x and 2.x")
    tensors = _tensors(file)
    if set(tensors) != set(XTI_LAYERS):
        raise UserError(f"--XTI_embeddings {file}: must have exactly {', '.join(XTI_LAYERS)}; has {_some(tensors)}")
    vectors = tuple(tensors[name] for name in XTI_LAYERS)
    if len({len(rows) for rows in vectors}) > 1:
        raise UserError(f"--XTI_embeddings {file}: its layers have different numbers of vectors")
    return Embedding(_word_of(file), file, vectors, by_layer=True)


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


def _word_of(file: str) -> str:
    return Path(file).stem


# ---- one text for each layer


class LayerTexts:
    """Gives each cross-attention layer the texts as its own vectors make them."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TriggerTokenizer,
        meanings: Sequence[Mapping[str, Sequence[int]]],
        embeddings: Sequence[Embedding],
    ) -> None:
        self._words = [word for embedding in embeddings for word in embedding.words]
        self._tokenizers = [tokenizer.with_meanings(own) for own in meanings]
        self._base = engine
        self._engines: list[Engine] = []

    @contextmanager
    def extension(self, setup: Setup) -> Generator[None]:
        """Texts without such words are the same for all layers and left alone."""
        texts = "\n".join(text for job in setup.batch for text in (job.prompt, job.negative_prompt))
        if not any(word in texts for word in self._words):
            yield
            return
        if setup.batch[0].shared.regional:
            raise UserError("--XTI_embeddings cannot be used in regions (AND and --mask_path)")
        with ExitStack() as stack:
            layers = cross_attentions(setup.unet.unet)
            for engine, layer in zip(self._of_layers(), layers, strict=True):
                hidden_BTD = engine.condition(setup.batch).hidden_BTD
                handle = layer.register_forward_pre_hook(_telling(hidden_BTD), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _of_layers(self) -> list[Engine]:
        """The engine once for each layer, with that layer's words and a memory of its own for texts."""
        if not self._engines:
            base = self._base
            self._engines = [
                replace(base, family=base.family.with_tokenizers([own]), _texts={}) for own in self._tokenizers
            ]
        return self._engines


def _telling(hidden_BTD: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, {**named, "encoder_hidden_states": hidden_BTD}

    return hook


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    """The cross-attention layers in the order in which a picture goes through them: down, middle, up."""
    found = [(path, module) for path, module in unet.named_modules() if path.endswith(".attn2")]
    return [module for start in _LAYER_ORDER for path, module in found if path.startswith(start)]
