"""Sentences in place of captions, captions that lack the word, and the rows that learn beside a vocabulary."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from library.data.captions import render
from library.data.records import CaptionClock, CaptionRules, DatasetKind, DatasetSpec, SubsetSpec
from library.log import UserError
from library.options import EmbeddingOptions
from library.text.embedding_files import Embedding, read_embedding, write_embedding
from library.text.triggers import GrownEmbedding
from library.training.word_captions import OBJECT_TEMPLATES, STYLE_TEMPLATES, with_templates

CLOCK = CaptionClock(epoch=1, step=0, max_train_steps=10)
SPEC = DatasetSpec(DatasetKind.DREAMBOOTH, 1, None, (SubsetSpec("a"), SubsetSpec("b", is_reg=True)))


def test_the_sentences_are_those_of_other_trainers() -> None:
    assert len(set(OBJECT_TEMPLATES)) == len(OBJECT_TEMPLATES) == 27
    assert len(STYLE_TEMPLATES) == 19
    twice = {text for text, count in Counter(STYLE_TEMPLATES).items() if count == 2}
    assert twice == {f"a {kind} painting in the style of {{}}" for kind in ("cropped", "close-up")}


def test_objects_win_and_every_subset_has_its_sentences() -> None:
    options = EmbeddingOptions(token_string=["sksx", "sksy"], use_object_template=True, use_style_template=True)
    (spec,) = with_templates([SPEC], options)
    assert [len(subset.captions.templates) for subset in spec.subsets] == [27, 27]
    assert "a photo of the nice sksx sksy" in spec.subsets[0].captions.templates
    assert with_templates([SPEC], EmbeddingOptions(token_string=["sksx"])) == (SPEC,)


def test_a_visit_takes_one_sentence_and_dropping_goes_first() -> None:
    rules = CaptionRules(templates=("one", "two"), caption_prefix="x")
    drawn = Counter(render("a caption", rules, CLOCK, random.Random(seed)) for seed in range(200))
    assert set(drawn) == {"one", "two"}
    assert min(drawn.values()) > 60
    assert rules.is_random
    dropping = CaptionRules(templates=("one",), caption_dropout_rate=1.0)
    assert render("a caption", dropping, CLOCK, random.Random(0)) == ""


@pytest.mark.parametrize("given", [["a b", "c"], "a b c", ("a", "b", "c")])
def test_words_may_be_given_in_one_text(given: object) -> None:
    assert EmbeddingOptions(token_string=given).token_string == ["a", "b", "c"]  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [[" "], ["a", "a"], ["a[b"]])
def test_what_is_no_word_is_refused(given: list[str]) -> None:
    with pytest.raises(UserError, match="token_string"):
        EmbeddingOptions(token_string=given)


def test_known_ids_give_what_they_gave_and_new_rows_alone_get_a_gradient() -> None:
    plain = nn.Embedding(10, 4).requires_grad_(False)
    rows_SVD = nn.Parameter(torch.randn(2, 3, 4))
    grown = GrownEmbedding(plain, rows_SVD)
    ids = torch.tensor([[0, 9, 10, 15], [12, 3, 3, 13]])
    out = grown(ids)
    assert torch.equal(out[0, :2], plain.weight[[0, 9]])
    assert torch.equal(out[[0, 0, 1, 1], [2, 3, 0, 3]], rows_SVD.flatten(0, 1)[[0, 5, 2, 3]])
    out.sum().backward()
    assert rows_SVD.grad is not None
    assert rows_SVD.grad.flatten(0, 1)[:, 0].tolist() == [1, 0, 1, 1, 0, 1]
    assert grown.weight is plain.weight
    assert list(grown.state_dict()) == ["weight"]
    assert len(list(grown.parameters())) == 1
    assert grown(torch.zeros(1, dtype=torch.int64)).requires_grad  # several processes need a gradient at every step


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_come_back_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    sdxl = Embedding("sksx", "", (torch.randn(2, 4), torch.randn(2, 6)))
    file = tmp_path / f"sksx{suffix}"
    write_embedding(file, sdxl, torch.float16, {"a": "b"})
    again = read_embedding(str(file), "sdxl")
    assert again.words == ["sksx", "sksx1"]
    assert again.meanings(7) == {"sksx": [7, 8], "sksx1": [8]}
    pairs = zip(sdxl.vectors, again.vectors, strict=True)
    assert all(torch.equal(written.half(), read) for written, read in pairs)
