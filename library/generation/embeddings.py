"""Textual inversion in generation: words of the prompts that stand for vectors from files.

Shapes: V vectors of a word, D width of a text encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

from torch import nn

from library.families.sd import SdFamily
from library.families.sd_layers import LayeredSdFamily
from library.generation.engine import Engine
from library.generation.jobs import Job
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
    encoders = enumerate(engine.parts.text_encoders)
    meanings = [_meanings(encoder, plain, index) for index, encoder in encoders]
    if by_layer:
        engine.family = _layered(engine, by_layer, meanings[0])
    else:
        pairs = zip(engine.family.tokenizers, meanings, strict=True)
        engine.family = engine.family.with_tokenizers([TriggerTokenizer(*pair) for pair in pairs])
    for embedding in found:
        count = len(embedding.vectors[0])
        logger.info("%s stands for %d vector%s (%s)", embedding.word, count, "s" * (count > 1), embedding.file)
    return tuple(found)


def _meanings(encoder: nn.Module, embeddings: Sequence[Embedding], index: int) -> dict[str, list[int]]:
    """The ids that words stand for, once their vectors of this index (V, D) are in the encoder's table."""
    found: dict[str, list[int]] = {}
    for embedding in embeddings:
        try:
            found |= embedding.meanings(add_vectors(encoder, embedding.vectors[index]))
        except ValueError as error:
            raise UserError(f"{embedding.file}: {error}; it was made for another kind of model") from error
    return found


def _layered(engine: Engine, embeddings: Sequence[Embedding], plain: dict[str, list[int]]) -> LayeredSdFamily:
    """The engine's family with words of which each layer has vectors of its own, beside ``plain`` ones."""
    (encoder,), (tokenizer,) = engine.parts.text_encoders, engine.family.tokenizers
    layers = [plain | _meanings(encoder, embeddings, index) for index in range(len(XTI_LAYERS))]
    first = TriggerTokenizer(tokenizer, layers[0])
    let_layers_choose(engine.parts.unet)
    engine.before_batch.append(_refusing_regions(embeddings))
    return LayeredSdFamily(cast(SdFamily, engine.family), [first.with_meanings(own) for own in layers])


def _refusing_regions(embeddings: Sequence[Embedding]) -> Callable[[Sequence[Job]], None]:
    """In regions a text is read by itself, the same in all layers."""
    words = [word for embedding in embeddings for word in embedding.words]

    def refuse(batch: Sequence[Job]) -> None:
        texts = "\n".join(text for job in batch for text in (job.prompt, job.negative_prompt))
        if batch[0].shared.regional and any(word in texts for word in words):
            raise UserError("--XTI_embeddings cannot be used in regions (AND and --mask_path)")

    return refuse
