"""Textual inversion in generation: words of the prompts that stand for vectors from files.

Shapes: V vectors of a word, D width of a text encoder, B rows of text, S cross-attention layers, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from library.generation.denoise import Setup
from library.generation.engine import Engine
from library.log import UserError
from library.models.layer_texts import let_layers_choose
from library.options.generation import PromptOptions
from library.text.embedding_files import (
    XTI_LAYERS,
    Embedding,
    read_embedding,
    read_layer_embedding,
    require_own_words,
)
from library.text.triggers import TriggerTokenizer, add_vectors

logger = logging.getLogger(__name__)


def attach_embeddings(engine: Engine, options: PromptOptions) -> tuple[Embedding, ...]:
    """Teach the engine's prompts the words of the options' files. Raises UserError.

    The engine gets a family of its own with other tokenizers, and its text encoders more tokens.
    """
    family = engine.family.name
    plain = [read_embedding(file, family) for file in options.textual_inversion_embeddings or ()]
    by_layer = [read_layer_embedding(file, family) for file in options.XTI_embeddings or ()]
    found = [*plain, *by_layer]
    if not found:
        return ()
    require_own_words(engine.family.tokenizers, found, "rename the file")
    tokenizers: list[TriggerTokenizer] = []
    encoders = zip(engine.parts.text_encoders, engine.family.tokenizers, strict=True)
    for index, (encoder, tokenizer) in enumerate(encoders):
        meanings: dict[str, list[int]] = {}
        for embedding in plain:
            meanings |= embedding.meanings(_add(encoder, embedding.vectors[index], embedding.file))
        layers = [{key: list(ids) for key, ids in meanings.items()} for _ in XTI_LAYERS]
        for embedding in by_layer:
            for own, vectors_VD in zip(layers, embedding.vectors, strict=True):
                own |= embedding.meanings(_add(encoder, vectors_VD, embedding.file))
        tokenizers.append(TriggerTokenizer(tokenizer, layers[0] if by_layer else meanings))
        if by_layer:
            let_layers_choose(engine.parts.unet)
            engine.extensions.append(LayerTexts(engine, tokenizers[0], layers, by_layer).extension)
    engine.family = engine.family.with_tokenizers(tokenizers)
    for embedding in found:
        count = len(embedding.vectors[0])
        logger.info("%s stands for %d vector%s (%s)", embedding.word, count, "s" * (count > 1), embedding.file)
    return tuple(found)


def _add(encoder: nn.Module, vectors_VD: Tensor, file: str) -> int:
    """The id of the first of the vectors."""
    try:
        return add_vectors(encoder, vectors_VD)
    except ValueError as error:
        raise UserError(f"{file}: {error}; it was made for another kind of model") from error


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
        if any(word in texts for word in self._words):
            if setup.batch[0].shared.regional:
                raise UserError("--XTI_embeddings cannot be used in regions (AND and --mask_path)")
            of_layers = [engine.condition(setup.batch).hidden_BTD for engine in self._of_layers()]
            setup.unet.condition = replace(setup.unet.condition, by_layer_BSTD=torch.stack(of_layers, dim=1))
        yield

    def _of_layers(self) -> list[Engine]:
        """The engine once for each layer, with that layer's words and a memory of its own for texts."""
        if not self._engines:
            base = self._base
            self._engines = [
                replace(base, family=base.family.with_tokenizers([own]), _texts={}) for own in self._tokenizers
            ]
        return self._engines
