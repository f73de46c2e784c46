"""Captions without padding: as long as the longest of their batch, with the states that padding would not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.families.base import TextSettings
from library.families.sd import SdFamily
from library.training.text_source import TextSource
from tests.text_diffusion_fixtures import toy_parts

SHORT, LONG = "a cat", "a (sks:1.3) thing on a table, seen from above"
PADDED = TextSettings(weighted_captions=True, clip_skip=2)
BARE = replace(PADDED, shrink=True, pad=False)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_states_are_those_of_padded_captions(family: str) -> None:
    parts, made = toy_parts(family), SdFamily(v2=family == "sd2")
    captions = [SHORT, "a cat on a table"]
    plain = replace(BARE, weighted_captions=False)
    with torch.no_grad():
        bare = made.encode(parts.text_encoders, made.tokenize(captions, plain), plain).hidden_BTD
        padded = made.encode(parts.text_encoders, made.tokenize(captions, PADDED), PADDED).hidden_BTD
    assert (bare.shape[1], padded.shape[1]) == (5 + 2, 77)
    torch.testing.assert_close(bare, padded[:, :7], rtol=1e-4, atol=1e-5)  # CLIP looks only backwards


def test_lengths_and_weights() -> None:
    family = SdFamily()
    (rows,) = family.tokenize([SHORT, LONG], BARE).rows
    assert rows.ids_BNT.shape[1:] == (1, rows.ids_BNT.shape[2])
    assert rows.weights_BL is not None
    assert rows.weights_BL.shape == (2, rows.ids_BNT.shape[2])
    assert rows.weights_BL.max() == pytest.approx(1.3)
    assert int((rows.ids_BNT[1, 0] == 49407).sum()) == 1  # the longest has its end mark and no padding
    (cut,) = family.tokenize([LONG * 20], BARE).rows
    assert cut.ids_BNT.shape == (1, 1, 77)
    (rows,) = family.tokenize([SHORT, LONG * 20], replace(BARE, max_token_length=150)).rows
    assert rows.ids_BNT.shape == (2, 2, 77)


def test_batches_of_other_lengths_follow_each_other() -> None:
    parts = toy_parts()
    source = TextSource(
        SdFamily(), parts, BARE, learns=False, captions_repeat=False, device=torch.device("cpu"), dtype=torch.float32
    )
    lengths = [source(batch).hidden_BTD.shape[1] for batch in ([SHORT], [SHORT, LONG], [SHORT])]
    assert lengths[0] == lengths[2] == 4 < lengths[1] < 77
