"""Textual inversion: new words learn as vectors of the text encoders; the model itself stays as it is.

R. Gal et al., "An Image is Worth One Word", arXiv:2208.01618. With a vector for each cross-attention layer: A. Voynov
et al., "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv:2303.09522.

What learns are tensors of their own beside the vocabulary, one for each text encoder: (S, V, D) with S = 1, or one set
of vectors for each layer, V vectors of all words together, D the encoder's width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.checkpoint.folders import atomic_folder
from library.families.base import ModelFamily, ModelParts
from library.families.sd import SdFamily
from library.families.sd_layers import LayeredSdFamily
from library.log import UserError
from library.models.layer_texts import let_layers_choose
from library.models.memory import store_in_fp8
from library.options import EmbeddingOptions, OptimizerOptions, PrecisionOptions
from library.options.settings import Settings
from library.text.embedding_files import (
    XTI_LAYERS,
    Embedding,
    read_embedding,
    read_layer_embedding,
    require_own_words,
    write_embedding,
)
from library.text.tokens import token_ids
from library.text.triggers import TriggerTokenizer, let_learn
from library.training.trainable import Artifact, Trainable

logger = logging.getLogger(__name__)

OPTION = "--token_string"


@dataclass(frozen=True)
class Place:
    """Where a word's vectors are: ``count`` of them from ``first`` on, in each set."""

    word: str
    first: int
    count: int

    @property
    def rows(self) -> slice:
        """The vectors among those of all words."""
        return slice(self.first, self.first + self.count)


class EmbeddingTraining(Trainable):
    """One set of vectors for each text encoder."""

    by_layer = False
    may_train_text = True
    may_skip_parameters = False
    casts_itself = False

    def __init__(self, settings: Settings, family: ModelFamily, parts: ModelParts) -> None:
        options = settings[EmbeddingOptions]
        self._rate = settings[OptimizerOptions].learning_rate
        if self._rate == 0:
            raise UserError("nothing to train: --learning_rate is 0")
        self._family_name = family.name
        beginnings = starting_vectors(settings, family, parts, by_layer=self.by_layer)
        require_own_words(family.tokenizers, beginnings, "choose another word")
        self._places = _places(beginnings)
        self._started = [embedding.vectors for embedding in beginnings]
        self._counts = sorted({place.count for place in self._places})
        self.module = nn.ParameterDict(
            {
                name: nn.Parameter(torch.stack(sets)) if self.by_layer else nn.Parameter(sets[0][None])
                for name, sets in zip(parts.spec.text_parts, _sets_of_encoders(beginnings), strict=True)
            }
        )
        self._first_ids = self._attach(parts)
        if settings[PrecisionOptions].fp8_base:
            store_in_fp8(parts.unet)
        suffix = f".{options.save_model_as or 'safetensors'}"
        self._suffix = suffix
        self.artifact = Artifact(suffix if len(self._places) == 1 else "", modelspec_kind="textual-inversion")

    @staticmethod
    def trained_parts(settings: Settings) -> frozenset[str]:
        return frozenset({"text_encoder", "text_encoder_2"})

    def _attach(self, parts: ModelParts) -> list[int]:
        """Give the text encoders the new tokens; returns the id of each one's first."""
        try:
            return [let_learn(*pair) for pair in zip(parts.text_encoders, self._parameters(), strict=True)]
        except ValueError as error:
            raise UserError(f"--weights: {error}; it was made for another kind of model") from error

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    # ---- words

    def meanings(self, encoder: int, set_index: int = 0) -> dict[str, list[int]]:
        """The ids that each word stands for in a text encoder, in one of the sets of vectors."""
        total = self._parameters()[encoder].shape[1]
        first = self._first_ids[encoder] + set_index * total
        found: dict[str, list[int]] = {}
        for place, embedding in zip(self._places, self.embeddings(), strict=True):
            found |= embedding.meanings(first + place.first)
        return found

    def family_of_prompts(self, family: ModelFamily) -> ModelFamily:
        return family.with_tokenizers(
            [TriggerTokenizer(tokenizer, self.meanings(index)) for index, tokenizer in enumerate(family.tokenizers)]
        )

    def embeddings(self) -> list[Embedding]:
        """The words with the vectors as they are now, which are views of what learns."""
        sets = [own_VD for parameter in self._parameters() for own_VD in parameter.detach()]
        return [
            Embedding(place.word, OPTION, tuple(own_VD[place.rows] for own_VD in sets), self.by_layer)
            for place in self._places
        ]

    # ---- the run

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": self._parameters(), "lr": self._rate, "lr_name": "embedding"}]

    def why_no_multiplier(self) -> str:
        return "is for networks, words have no strength"

    def after_update(self) -> dict[str, float]:
        norms = torch.cat([parameter.detach().float().norm(dim=-1).flatten() for parameter in self._parameters()])
        return {"embedding/average_norm": float(norms.mean())}

    def enable_gradient_checkpointing(self) -> None:
        """Vectors are looked up, not computed: there is nothing to compute again."""

    # ---- what is written

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], counters: Mapping[str, int]) -> None:
        embeddings = self.embeddings()
        if len(embeddings) == 1:
            write_embedding(Path(path), embeddings[0], dtype, metadata)
            return
        with atomic_folder(Path(path)) as folder:
            for embedding in embeddings:
                write_embedding(folder / self._file_name(embedding.word), embedding, dtype, metadata)

    def _file_name(self, word: str) -> str:
        return word.replace("/", "_").replace("\\", "_") + self._suffix

    def check(self, path: Path) -> list[str]:
        lines: list[str] = []
        for place, started in zip(self._places, self._started, strict=True):
            file = path if self.artifact.suffix else path / self._file_name(place.word)
            read = read_layer_embedding if self.by_layer else read_embedding
            vectors = read(str(file), self._family_name).vectors
            lines += _report(file.name, place.word, vectors, started)
        return lines

    def recorded_options(self) -> dict[str, Any]:
        return {"num_vectors_per_token": self._counts[0]} if len(self._counts) == 1 else {}


class LayerEmbeddingTraining(EmbeddingTraining):
    """A set of vectors for each of the 16 cross-attention layers of SD 1.x and 2.x."""

    by_layer = True

    def __init__(self, settings: Settings, family: ModelFamily, parts: ModelParts) -> None:
        super().__init__(settings, family, parts)
        let_layers_choose(parts.unet)

    def family_of_prompts(self, family: ModelFamily) -> ModelFamily:
        first = TriggerTokenizer(family.tokenizers[0], self.meanings(0))
        others = [first.with_meanings(self.meanings(0, index)) for index in range(1, len(XTI_LAYERS))]
        return LayeredSdFamily(cast(SdFamily, family), [first, *others])


# ---- how words begin


def starting_vectors(
    settings: Settings, family: ModelFamily, parts: ModelParts, *, by_layer: bool = False
) -> list[Embedding]:
    """The words with the vectors that they begin as: those of files, of known words, or random ones.

    Raises UserError for files and words that do not fit.
    """
    options = settings[EmbeddingOptions]
    words = options.token_string or []
    files, init_words = _for_each(options.weights, words, "weights"), _init_words(options, words)
    wanted = options.num_vectors_per_token
    found: list[Embedding] = []
    for word, file, init_word in zip(words, files, init_words, strict=True):
        if file is not None:
            loaded = read_layer_embedding(file, family.name) if by_layer else read_embedding(file, family.name)
            count = len(loaded.vectors[0])
            if settings.given("num_vectors_per_token") and count != wanted:
                raise UserError(f"--weights {file}: has {count} vectors, --num_vectors_per_token says {wanted}")
            vectors = tuple(vectors_VD.float() for vectors_VD in loaded.vectors)
        elif init_word is not None:
            vectors = _known_vectors(init_word, wanted, family, parts)
        else:
            vectors = tuple(_random_vectors(_table(encoder), wanted) for encoder in parts.text_encoders)
        if by_layer and file is None:
            vectors = vectors * len(XTI_LAYERS)
        device = _table(parts.text_encoders[0]).device
        found.append(Embedding(word, OPTION, tuple(vectors_VD.to(device) for vectors_VD in vectors), by_layer))
    return found


def _for_each(values: list[str] | None, words: list[str], option: str) -> list[str] | list[None]:
    if not values:
        return [None] * len(words)
    if len(values) != len(words):
        raise UserError(f"--{option}: {len(values)} given for {len(words)} words in {OPTION}; give one for each")
    return values


def _init_words(options: EmbeddingOptions, words: list[str]) -> list[str] | list[None]:
    """The text that each word begins as: one for all, one for each, or for a single word all of them together."""
    given = options.init_word
    if given and len(words) == 1:
        return [" ".join(given)]
    return given * len(words) if given and len(given) == 1 else _for_each(given, words, "init_word")


def _known_vectors(text: str, count: int, family: ModelFamily, parts: ModelParts) -> tuple[Tensor, ...]:
    """Vector i begins as that of token i of the text, beginning anew where the text has fewer tokens."""
    found: list[Tensor] = []
    for tokenizer, encoder in zip(family.tokenizers, parts.text_encoders, strict=True):
        (ids,) = token_ids(tokenizer, [text])
        if not ids:
            raise UserError(f"--init_word {text!r}: holds no word")
        if len(ids) not in (1, count) and not found:
            used = "the first ones are used" if len(ids) > count else "they are used again from the first on"
            logger.warning("--init_word %s: %d tokens for %d vectors; %s", text, len(ids), count, used)
        found.append(_table(encoder)[[ids[index % len(ids)] for index in range(count)]].float())
    return tuple(found)


def _random_vectors(table_ND: Tensor, count: int) -> Tensor:
    """Vectors as long as known ones, from the global generator, which is seeded for what learns."""
    drawn_VD = torch.randn(count, table_ND.shape[1]).to(table_ND.device)
    return drawn_VD * table_ND.float().std()


def _table(encoder: nn.Module) -> Tensor:
    return cast(Any, encoder).get_input_embeddings().weight.detach()


def _places(embeddings: list[Embedding]) -> list[Place]:
    places: list[Place] = []
    first = 0
    for embedding in embeddings:
        count = len(embedding.vectors[0])
        places.append(Place(embedding.word, first, count))
        first += count
    return places


def _sets_of_encoders(embeddings: list[Embedding]) -> list[list[Tensor]]:
    """For each text encoder its sets of vectors (V, D) of all words."""
    try:
        sets = [torch.cat(vectors) for vectors in zip(*(one.vectors for one in embeddings), strict=True)]
    except RuntimeError as error:
        raise UserError("--weights: the files are for models of different kinds") from error
    return [sets] if embeddings[0].by_layer else [[own_VD] for own_VD in sets]


def _report(file: str, word: str, vectors: tuple[Tensor, ...], started: tuple[Tensor, ...]) -> list[str]:
    """Lines about a saved file: how many vectors, how long, how far they moved."""
    pairs = [(now.float(), before.cpu()) for now, before in zip(vectors, started, strict=True)]
    if not all(bool(now.isfinite().all()) for now, _ in pairs):
        return [f"{file}: its vectors hold NaN or infinite values; do not use this file"]
    norm = sum(float(now.norm(dim=-1).mean()) for now, _ in pairs) / len(pairs)
    moved = sum(float((now - before).norm(dim=-1).mean()) for now, before in pairs) / len(pairs)
    count = f"{len(vectors[0])} vector{'s' if len(vectors[0]) > 1 else ''}"
    lines = [f"{file}: {word} stands for {count} of average norm {norm:.3g}, moved by {moved:.3g}"]
    return lines if moved else [*lines, f"{file}: {word} did not move; does it stand in the captions?"]
