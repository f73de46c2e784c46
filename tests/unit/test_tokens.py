"""Rows of token ids: vectors of the specification, weights, BREAK, counting, and the built-in tokenizer."""

import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.log import UserError
from library.text.tokenizer import clip_tokenizer
from library.text.tokens import TextSettings, TokenRules, count_tokens, token_rows, tokenize

SMALL = {99: TokenRules(98, 99, 99, row_length=5), 0: TokenRules(98, 99, 0, row_length=5)}
CLIP = clip_tokenizer()


@pytest.mark.parametrize(
    ("pad", "count", "rows"),
    [
        (99, 4, "98 1 2 3 99 | 98 4 99 99 99 | 98 99 99 99 99"),
        (0, 0, "98 99 0 0 0 | 98 99 0 0 0 | 98 99 0 0 0"),
        (0, 3, "98 1 2 3 99 | 98 99 0 0 0 | 98 99 0 0 0"),
        (0, 4, "98 1 2 3 99 | 98 4 99 0 0 | 98 99 0 0 0"),
        (0, 9, "98 1 2 3 99 | 98 4 5 6 99 | 98 7 8 9 99"),
        (0, 12, "98 1 2 3 99 | 98 4 5 6 99 | 98 7 8 9 99"),
        (99, 12, "98 1 2 3 99 | 98 4 5 6 99 | 98 7 8 9 99"),
    ],
)
def test_three_rows_of_three(pad: int, count: int, rows: str) -> None:
    expected = [[int(number) for number in row.split()] for row in rows.split("|")]
    assert token_rows(list(range(1, count + 1)), 3, SMALL[pad]) == expected


@given(st.lists(st.integers(1, 90), max_size=20), st.integers(1, 4), st.sampled_from([0, 99]))
def test_rows_hold_the_ids_in_order(ids: list[int], rows: int, pad: int) -> None:
    result = token_rows(ids, rows, SMALL[pad])
    assert [len(row) for row in result] == [5] * rows
    assert all(row[0] == 98 and 99 in row for row in result)
    assert [token for row in result for token in row if 0 < token < 98] == ids[: 3 * rows]


def test_known_ids_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    tokenizer = clip_tokenizer(0)
    assert len(tokenizer) == 49408
    assert tokenizer.pad_token_id == 0
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_added_tokens_do_not_reach_the_next_tokenizer() -> None:
    clip_tokenizer().add_tokens(["<one>"])
    assert len(clip_tokenizer()) == 49408


@pytest.mark.parametrize("text", ["1girl, long hair", "naïve café 8K", "日本語 ☃", "it's  (masterpiece:1.2)", "!!! <3"])
def test_ids_equal_an_independent_tokenizer(text: str) -> None:
    oracle = pytest.importorskip("instant_clip_tokenizer")
    assert CLIP(text, add_special_tokens=False)["input_ids"] == list(oracle.Tokenizer().encode(text))


def test_saved_tokenizer_is_used_and_a_wrong_one_refused(tmp_path) -> None:
    folder = tmp_path / "openai_clip-vit-large-patch14"
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["<marked>"])
    tokenizer.save_pretrained(folder)
    assert len(clip_tokenizer(cache_dir=str(tmp_path))) == 49409
    assert len(clip_tokenizer(cache_dir=str(tmp_path / "absent"))) == 49408
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer_cache_dir"):
        clip_tokenizer(cache_dir=str(tmp_path))


def test_counts_are_without_marks_and_beyond_the_limit() -> None:
    assert count_tokens(["", "a photo of a cat", "cat " * 300]) == [0, 5, 300]
    assert count_tokens([]) == []


def test_weights_stand_at_their_tokens() -> None:
    rows = tokenize(CLIP, ["a (cat:1.5) dog", "bird"], TextSettings(weighted_captions=True))
    assert rows.ids_BNT.shape == (2, 1, 77)
    assert rows.weights_BL is not None
    assert rows.weights_BL[0, :5].tolist() == [1.0, 1.0, 1.5, 1.0, 1.0]
    assert rows.ids_BNT[0, 0, :5].tolist() == [49406, 320, 2368, 1929, 49407]
    assert rows.weights_BL[0, 5:].eq(1).all()
    assert rows.weights_BL[1].eq(1).all()


@pytest.mark.parametrize("pad_id", [0, 49407])
@pytest.mark.parametrize("length", [None, 150, 225])
@pytest.mark.parametrize("caption", ["", "a photo of a cat", "cat " * 80, "cat " * 300])
def test_a_caption_without_brackets_has_the_same_rows_weighted_or_not(
    pad_id: int, length: int | None, caption: str
) -> None:
    tokenizer = clip_tokenizer(pad_id)
    weighted = tokenize(tokenizer, [caption], TextSettings(max_token_length=length, weighted_captions=True))
    plain = tokenize(tokenizer, [caption], TextSettings(max_token_length=length))
    assert weighted.weights_BL is None
    assert torch.equal(weighted.ids_BNT, plain.ids_BNT)


def test_rows_of_a_weighted_caption_do_not_depend_on_its_batch() -> None:
    settings = TextSettings(max_token_length=225, weighted_captions=True)
    alone = tokenize(CLIP, ["(cat:2)"], settings)
    together = tokenize(CLIP, ["(cat:2)", "dog " * 200], settings)
    assert torch.equal(alone.ids_BNT[0], together.ids_BNT[0])
    assert alone.weights_BL is not None
    assert together.weights_BL is not None
    assert torch.equal(alone.weights_BL[0], together.weights_BL[0])


def test_weights_are_cut_with_their_tokens() -> None:
    rows = tokenize(CLIP, ["cat " * 74 + "(dog bird:3)"], TextSettings(weighted_captions=True))
    assert rows.weights_BL is not None
    assert rows.weights_BL.shape == (1, 77)
    assert rows.weights_BL[0, 75:].tolist() == [3.0, 1.0]


@pytest.mark.parametrize(("text", "rows"), [("", 1), ("cat " * 75, 1), ("cat " * 76, 2), ("cat " * 400, 3)])
def test_shrink_uses_the_rows_that_are_needed(text: str, rows: int) -> None:
    settings = TextSettings(max_token_length=225, shrink=True)
    assert tokenize(CLIP, [text, "a"], settings).ids_BNT.shape == (2, rows, 77)


@pytest.mark.parametrize("pad_id", [0, 49407])
def test_break_begins_a_new_row(pad_id: int) -> None:
    settings = TextSettings(max_token_length=225, weighted_captions=True, breaks=True, shrink=True)
    rows = tokenize(clip_tokenizer(pad_id), ["cat BREAK dog"], settings).ids_BNT[0].tolist()
    assert rows[0][:4] == [49406, 2368, 49407, pad_id]
    assert rows[1][:4] == [49406, 1929, 49407, pad_id]
    full = tokenize(clip_tokenizer(pad_id), ["cat " * 75 + "BREAK dog"], settings).ids_BNT[0]
    assert len(full) == 2  # a full row needs no filling, and no empty row follows it
