"""Token rows are the reference's for both paddings and all lengths."""

import gzip
import json
from pathlib import Path

import pytest

from library.text.tokenizer import clip_tokenizer
from library.text.tokens import TextSettings, tokenize

DATA = Path(__file__).with_name("data") / "token_ids.json.gz"
VECTORS = json.loads(gzip.decompress(DATA.read_bytes()))


@pytest.mark.parametrize(("number", "pad_id"), [(1, 49407), (2, 0)])
def test_rows_equal_the_references(number: int, pad_id: int) -> None:
    tokenizer = clip_tokenizer(pad_id)
    vectors = [vector for vector in VECTORS if vector["tokenizer"] == number]
    assert len(vectors) == 42
    for vector in vectors:
        rows = tokenize(tokenizer, [vector["caption"]], TextSettings(max_token_length=vector["max_length"] - 2))
        assert rows.ids_BNT[0].tolist() == vector["ids"], vector["caption"]
        assert rows.weights_BL is None
