"""Interchange with the reference: its text encoder archives are read, ours have the same members."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.text_cache import TextLayout, TextOutputs, TextStore, TextTarget, targets_of
from tests.data_fixtures import cover_fit, dataset, record

DATA = Path(__file__).parent / "data" / "cache"
LAYOUT = TextLayout(77, (64, 64), 64)  # the narrow model that the archive is of
CAPTION = "a cat"


def archive_of(target: TextTarget) -> Path:
    return Path(target.path).with_name("chelsea_te_outputs.npz")


@pytest.fixture
def target(tmp_path: Path) -> TextTarget:
    """The photo with its caption and the archive that the reference wrote for it."""
    shutil.copy(DATA / "chelsea.png", tmp_path / "chelsea.png")
    (tmp_path / "chelsea.txt").write_text(CAPTION)
    shutil.copy(DATA / "chelsea_te_outputs.npz", tmp_path / "chelsea_te_outputs.npz")
    now = time.time_ns()
    os.utime(tmp_path / "chelsea_te_outputs.npz", ns=(now, now))
    one = replace(
        record(tmp_path / "chelsea.png", (451, 300)), caption=CAPTION, caption_path=str(tmp_path / "chelsea.txt")
    )
    (found,) = targets_of([dataset([one], [cover_fit((451, 300), (448, 256))])], 0, to_disk=True)
    return found


def test_the_references_archive_is_read(target: TextTarget) -> None:
    store = TextStore(LAYOUT, {"encoders": ["any"]}, to_disk=True)
    assert store.find([target]) == []
    outputs = store.load(CAPTION)
    with np.load(DATA / "chelsea_te_outputs.npz") as archive:
        states = [archive["hidden_state1"], archive["hidden_state2"]]
        assert np.array_equal(outputs.hidden_TD.numpy(), np.concatenate(states, axis=1))
        assert np.array_equal(np.asarray(outputs.pooled_P), archive["pool2"])
    assert (outputs.hidden_TD.dtype, store.notes.foreign) == (torch.float32, [str(archive_of(target))])


@pytest.mark.parametrize(
    "layout", [TextLayout(152, (64, 64), 64), TextLayout(77, (64, 80), 64), TextLayout(77, (64, 64), 48)]
)
def test_it_is_not_believed_for_another_model(target: TextTarget, layout: TextLayout) -> None:
    assert TextStore(layout, {}, to_disk=True).find([target]) == [0]


def test_what_we_write_differs_only_in_the_fingerprint(target: TextTarget) -> None:
    file = archive_of(target)
    file.unlink()
    store = TextStore(LAYOUT, {"encoders": ["any"]}, to_disk=True)
    assert store.find([target]) == [0]
    store.put(target, [TextOutputs(torch.randn(77, 128, dtype=torch.float16), torch.randn(64, dtype=torch.float16))])
    with np.load(DATA / "chelsea_te_outputs.npz") as theirs, np.load(file) as ours:
        assert set(ours.files) == {*theirs.files, "fingerprint"}
        for name in theirs.files:
            assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)


@pytest.mark.parametrize(("fault", "used"), [("none", True), ("half", True), ("projection", False), ("text", False)])
def test_it_is_believed_only_if_the_encoders_give_the_same(target: TextTarget, fault: str, used: bool) -> None:
    """The reference does not transpose the projection of single files, so its pooled vectors are other ones."""
    with np.load(DATA / "chelsea_te_outputs.npz") as archive:
        hidden_TD = torch.from_numpy(np.concatenate([archive["hidden_state1"], archive["hidden_state2"]], axis=1))
        pooled_P = torch.from_numpy(archive["pool2"])
    if fault == "half":
        hidden_TD, pooled_P = hidden_TD.bfloat16(), pooled_P.bfloat16()
    elif fault == "projection":
        pooled_P = pooled_P.flip(0)
    elif fault == "text":
        hidden_TD = hidden_TD.flip(1)
    asked: list[str] = []

    def encode(text: str) -> TextOutputs:
        asked.append(text)
        return TextOutputs(hidden_TD, pooled_P)

    store = TextStore(LAYOUT, {}, to_disk=True, encode=encode)
    assert store.find([target]) == ([] if used else [0])
    file = str(archive_of(target))
    assert (store.notes.foreign, store.notes.unlike) == (([file], []) if used else ([], [file]))
    assert store.fetch(target) == used
    assert asked == [CAPTION]  # one answers for all
