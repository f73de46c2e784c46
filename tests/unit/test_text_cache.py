"""Text encoder outputs made ahead: which archives are believed, what is encoded again, how the work is dealt out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.data.records import ResolvedDataset
from library.data.text_cache import TextLayout, TextOutputs, TextStore
from library.log import UserError
from library.models.spec import TextEncoderSpec
from library.text.tokens import TextSettings
from library.training.caching import WorkShare
from library.training.text_caching import CAPTIONS_AT_ONCE, CaptionEncoder, in_float32, layout_of
from library.training.text_source import CachedTextSource
from tests.text_cache_fixtures import FAMILY, Counting, cache, captioned, encoder

TWO = {"a.png": "a cat, sitting", "b.png": "two dogs"}
CPU = torch.device("cpu")


def archives(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npz"))


def direct(encode: CaptionEncoder, text: str) -> TextOutputs:
    condition = FAMILY.encode(encode.encoders, FAMILY.tokenize([text], encode.settings), encode.settings)
    assert condition.pooled_BP is not None
    return TextOutputs(condition.hidden_BTD[0].detach(), condition.pooled_BP[0].detach())


def assert_close(one: TextOutputs, other: TextOutputs) -> None:
    torch.testing.assert_close(one.hidden_TD, other.hidden_TD)
    torch.testing.assert_close(one.pooled_P, other.pooled_P)


# ---- what is made


@pytest.mark.parametrize("disk", [True, False])
def test_the_rendered_caption_is_what_counts(tmp_path: Path, disk: bool) -> None:
    encode = encoder()
    data = captioned(tmp_path, {"a.png": "cat;;;sitting"}, caption_prefix="pre,", secondary_separator=";;;")
    store, _ = cache([data], encode, disk)
    assert encode.captions == ["pre, cat, sitting"]
    assert_close(store.load("pre, cat, sitting"), direct(encode, "pre, cat, sitting"))
    with pytest.raises(KeyError, match="cat;;;sitting"):
        store.load("cat;;;sitting")


@pytest.mark.parametrize("disk", [True, False])
def test_equal_captions_are_encoded_once_in_batches(tmp_path: Path, disk: bool) -> None:
    encode = encoder()
    texts = {f"{index:03}.png": f"caption {index % 20}" for index in range(60)}
    store, report = cache([captioned(tmp_path, texts)], encode, disk)
    assert sorted(encode.captions) == sorted(set(texts.values()))
    assert [len(call) for call in encode.calls] == [CAPTIONS_AT_ONCE, 20 - CAPTIONS_AT_ONCE]
    assert report.encoded == 20
    assert len(archives(tmp_path)) == (60 if disk else 0)
    assert_close(store.load("caption 7"), direct(encode, "caption 7"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_keeps_the_weights_type_without_the_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    store, _ = cache([captioned(tmp_path, TWO)], encoder(), False, memory_dtype=dtype)
    kept = store.load("two dogs")
    assert kept.hidden_TD.dtype == dtype
    assert kept.hidden_TD.untyped_storage().nbytes() == kept.hidden_TD.nbytes


def test_the_file_has_the_references_members_and_ours(tmp_path: Path) -> None:
    encode = encoder(max_token_length=150)
    data = captioned(tmp_path, {"a.png": "a, b, c, d, e"}, shuffle_caption=True)
    store, _ = cache([data], encode, variants=3)
    bases = {"hidden_state1": (152, 32), "hidden_state2": (152, 64), "pool2": (48,)}
    with np.load(tmp_path / "a_te_outputs.npz", allow_pickle=False) as archive:
        names = {f"{base}{suffix}": shape for base, shape in bases.items() for suffix in ("", "_variant1", "_variant2")}
        assert set(archive.files) == {*names, "fingerprint"}
        assert {name: archive[name].shape for name in names} == names
        assert {archive[name].dtype for name in names} == {np.dtype(np.float32)}
        first = direct(encode, encode.captions[0])
        assert str(tmp_path) not in str(archive["fingerprint"])
        hidden = np.concatenate([archive["hidden_state1"], archive["hidden_state2"]], axis=1)
        assert np.allclose(hidden, first.hidden_TD.numpy(), atol=1e-5)
        assert np.allclose(archive["pool2"], np.asarray(first.pooled_P), atol=1e-5)
    for text in encode.captions:
        assert_close(store.load(text), direct(encode, text))


def test_the_empty_caption_is_there_if_captions_can_be_dropped(tmp_path: Path) -> None:
    encode = encoder()
    store, _ = cache([captioned(tmp_path, TWO, caption_dropout_rate=0.1)], encode)
    assert_close(store.load(""), direct(encode, ""))
    again = encoder()
    cache([captioned(tmp_path, TWO, caption_dropout_rate=0.1)], again)
    assert again.captions == [""]  # not worth a place in each archive
    store, _ = cache([captioned(tmp_path, TWO)], again)
    assert "" not in store


def test_a_batch_is_put_together_in_its_order(tmp_path: Path) -> None:
    encode = encoder()
    store, _ = cache([captioned(tmp_path, TWO)], encode)
    source = CachedTextSource(store, device=CPU, dtype=torch.bfloat16)
    condition = source(("two dogs", "a cat, sitting", "two dogs"))
    assert condition.hidden_BTD.dtype == torch.bfloat16
    assert condition.pooled_BP is not None
    assert torch.equal(condition.hidden_BTD[0], condition.hidden_BTD[2])
    expected = direct(encode, "a cat, sitting")
    torch.testing.assert_close(condition.hidden_BTD[1], expected.hidden_TD.bfloat16())
    torch.testing.assert_close(condition.pooled_BP[1], torch.as_tensor(expected.pooled_P).bfloat16())


# ---- what is believed, what is made again


def test_the_second_start_encodes_nothing(tmp_path: Path) -> None:
    first, _ = cache([captioned(tmp_path, TWO)], encoder())
    again = encoder()
    second, report = cache([captioned(tmp_path, TWO)], again)
    assert (again.calls, report.reused, report.total) == ([], 2, 2)
    assert torch.equal(first.load("two dogs").hidden_TD, second.load("two dogs").hidden_TD)


@pytest.mark.parametrize(
    ("captions", "rules", "made_by", "expected"),
    [
        ({}, {"caption_prefix": "x"}, {}, ["x a cat, sitting", "x two dogs"]),
        ({"b.png": "three dogs"}, {}, {}, ["three dogs"]),
        ({}, {}, {"seed": 1}, ["a cat, sitting", "two dogs"]),
        ({}, {}, {"max_token_length": 150}, ["a cat, sitting", "two dogs"]),
        ({}, {}, {"dtype": torch.bfloat16}, ["a cat, sitting", "two dogs"]),
        ({"a.png": "a, b, c, d"}, {"shuffle_caption": True}, {}, []),
    ],
)
def test_what_changed_is_encoded_again_under_the_same_name(
    tmp_path: Path, captions: dict[str, str], rules: dict[str, Any], made_by: dict[str, Any], expected: list[str]
) -> None:
    cache([captioned(tmp_path, TWO)], encoder())
    again = encoder(**made_by)
    _, report = cache([captioned(tmp_path, TWO | captions, **rules)], again, variants=3)
    shuffled = {text for text in again.captions if sorted(text) == sorted("a, b, c, d")}
    assert len(shuffled) >= 2 if "shuffle_caption" in rules else not shuffled
    assert set(again.captions) - shuffled == set(expected)
    assert archives(tmp_path) == ["a_te_outputs.npz", "b_te_outputs.npz"]
    assert "out of date" in report.notes[0]


def test_changed_text_in_one_encoder_only_is_noticed(tmp_path: Path) -> None:
    cache([captioned(tmp_path, TWO)], encoder())
    again = encoder()
    with torch.no_grad():
        next(again.encoders[1].parameters()).add_(1e-3)
    cache([captioned(tmp_path, TWO)], again)
    assert len(again.captions) == 2


def test_half_an_archive_is_made_again(tmp_path: Path) -> None:
    cache([captioned(tmp_path, TWO)], encoder())
    broken = tmp_path / "a_te_outputs.npz"
    broken.write_bytes(broken.read_bytes()[:5000])
    again = encoder()
    store, report = cache([captioned(tmp_path, TWO)], again)
    assert again.captions == ["a cat, sitting"]
    assert "unreadable" in report.notes[0]
    assert_close(store.load("a cat, sitting"), direct(again, "a cat, sitting"))


def test_an_archive_without_one_variant_is_made_again(tmp_path: Path) -> None:
    data = captioned(tmp_path, {"a.png": "a, b, c, d, e"}, shuffle_caption=True)
    cache([data], encoder(), variants=2)
    file = tmp_path / "a_te_outputs.npz"
    with np.load(file) as archive:
        kept = {name: archive[name] for name in archive.files if name != "pool2_variant1"}
    np.savez(file, **kept)
    again = encoder()
    cache([data], again, variants=2)
    assert len(again.captions) == 2


def test_damage_and_exchange_while_training_are_said(tmp_path: Path) -> None:
    store, _ = cache([captioned(tmp_path, TWO)], encoder())
    other, _ = cache([captioned(tmp_path, TWO, caption_prefix="x")], encoder())
    with pytest.raises(UserError, match="changed by another program"):
        store.load("two dogs")
    file = tmp_path / "b_te_outputs.npz"
    data = bytearray(file.read_bytes())
    data[3000] ^= 0xFF  # inside the first array: the directory stays right
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        other.load("x two dogs")
    assert not file.exists()


# ---- names


def test_images_of_one_stem_do_not_fight(tmp_path: Path) -> None:
    texts = {"a.png": "the first", "a.webp": "the second", "a.bmp": "the third"}
    cache([captioned(tmp_path, texts)], encoder())
    names = archives(tmp_path)
    assert len(names) == 3
    assert "a_te_outputs.npz" in names
    again = encoder()
    store, _ = cache([captioned(tmp_path, dict(reversed(texts.items())))], again)
    assert again.calls == []
    assert_close(store.load("the second"), direct(again, "the second"))


def test_one_image_in_two_data_sets_with_other_rules(tmp_path: Path) -> None:
    both = [captioned(tmp_path, TWO), captioned(tmp_path, TWO, caption_prefix="x")]
    cache(both, encoder())
    assert len(archives(tmp_path)) == 4
    again = encoder()
    cache(both[::-1], again)
    assert again.calls == []


# ---- other programs' archives


def write_foreign(path: Path, encode: CaptionEncoder, text: str) -> None:
    arrays = layout_of(encode.specs, encode.settings).arrays(direct(encode, text))
    rounded: dict[str, Any] = {name: array * 1.01 for name, array in arrays.items()}
    np.savez(path, **rounded)
    moment = time.time_ns() + 10**9
    os.utime(path, ns=(moment, moment))


def foreign(folder: Path, **rules: Any) -> tuple[ResolvedDataset, Path]:
    data, path = captioned(folder, {"a.png": "a cat"}, **rules), folder / "a_te_outputs.npz"
    write_foreign(path, encoder(), "a cat")
    return data, path


def test_a_foreign_archive_serves_the_stored_caption(tmp_path: Path) -> None:
    data, _ = foreign(tmp_path, caption_dropout_every_n_epochs=2)
    encode = encoder()
    store, report = cache([data], encode)
    assert encode.captions == ["a cat", ""]  # the first to compare
    assert "without a fingerprint were used" in report.notes[0]
    torch.testing.assert_close(store.load("a cat").hidden_TD, direct(encode, "a cat").hidden_TD * 1.01)


def test_a_foreign_archive_of_other_encoders_is_made_again(tmp_path: Path) -> None:
    data, path = foreign(tmp_path)
    store, report = cache([data], encode := encoder(seed=1))
    assert [("hold something else" in note, str(path) in note) for note in report.notes] == [(True, True)]
    assert_close(store.load("a cat"), direct(encode, "a cat"))


@pytest.mark.parametrize("source", ["a.png", "a.png.txt"])
def test_a_foreign_archive_older_than_its_sources_is_made_again(tmp_path: Path, source: str) -> None:
    data, path = foreign(tmp_path)
    moment = path.stat().st_mtime_ns + 10**9
    os.utime(tmp_path / source, ns=(moment, moment))
    encode = encoder()
    cache([data], encode)
    assert encode.captions == ["a cat"]
    assert archives(tmp_path) == ["a_te_outputs.npz"]


@pytest.mark.parametrize(
    ("rules", "length"), [({"caption_prefix": "x"}, None), ({"shuffle_caption": True}, None), ({}, 150)]
)
def test_a_foreign_archive_of_other_use_is_left_alone(
    tmp_path: Path, rules: dict[str, Any], length: int | None
) -> None:
    data, path = foreign(tmp_path, **rules)
    if "shuffle_caption" in rules:
        data = captioned(tmp_path, {"a.png": "a, b, c, d, e"}, **rules)
        write_foreign(path, encoder(), "a, b, c, d, e")
    before = path.read_bytes()
    encode = encoder(max_token_length=length)
    cache([data], encode, variants=4)
    assert len(encode.captions) == (4 if "shuffle_caption" in rules else 1)
    assert path.read_bytes() == before
    assert len(archives(tmp_path)) == 2


def test_class_tokens_have_no_date_so_nothing_foreign_is_believed(tmp_path: Path) -> None:
    data, _ = foreign(tmp_path)
    data = replace(data, records=(replace(data.records[0], caption_path=None),))
    encode = encoder()
    cache([data], encode)
    assert encode.captions == ["a cat"]


# ---- numbers that are not finite


class Overflowing(Counting):
    """Gives no finite numbers for captions with the word hot, in half precision or (``always``) ever."""

    always = False

    def __call__(self, captions: Sequence[str]) -> list[TextOutputs]:
        outputs = super().__call__(captions)
        half = next(self.encoders[0].parameters()).dtype != torch.float32
        for text, one in zip(captions, outputs, strict=True):
            if "hot" in text and (half or self.always):
                one.hidden_TD[3, 5] = float("inf")
        return outputs


@pytest.mark.parametrize("disk", [True, False])
def test_not_finite_outputs_are_made_again_in_float32(tmp_path: Path, disk: bool) -> None:
    plain = encoder(dtype=torch.bfloat16)
    before = [parameter.clone() for one in plain.encoders for parameter in one.parameters()]
    encode = Overflowing(plain.family, plain.encoders, plain.specs, plain.settings)
    store, report = cache([captioned(tmp_path, {"a.png": "hot", "b.png": "cold"})], encode, disk)
    assert encode.calls == [["cold", "hot"], ["hot"]]
    assert [Path(name).name for name in report.float32_retries] == ["a.png"]
    assert store.load("hot").is_finite()
    after = [parameter for one in plain.encoders for parameter in one.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("disk", [True, False])
def test_outputs_that_stay_not_finite_name_the_image(tmp_path: Path, disk: bool) -> None:
    class Hopeless(Overflowing):
        always = True

    plain = encoder()
    encode = Hopeless(plain.family, plain.encoders, plain.specs, plain.settings)
    with pytest.raises(UserError, match=r"a\.png: the text encoders give no finite numbers") as caught:
        cache([captioned(tmp_path, {"a.png": "hot", "b.png": "cold"})], encode, disk)
    assert "b.png" not in str(caught.value)


def test_float32_meanwhile_ends_with_the_former_types() -> None:
    layer = torch.nn.Linear(4, 4)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    layer.bias.data = layer.bias.data.half()
    before = layer.weight.data.clone()
    with suppress(KeyboardInterrupt), in_float32([layer]):
        assert (layer.weight.dtype, layer.bias.dtype) == (torch.float32, torch.float32)
        raise KeyboardInterrupt
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.float8_e4m3fn, torch.float16)
    assert torch.equal(layer.weight.data.float(), before.float())


# ---- processes


def test_processes_share_the_work_on_disk(tmp_path: Path) -> None:
    texts = {f"{index:03}.png": f"caption {index % 64}" for index in range(70)}
    data = captioned(tmp_path, texts, caption_dropout_rate=0.5)
    barrier = threading.Barrier(2, timeout=20)
    encoders = [encoder(), encoder()]
    results: dict[int, Any] = {}

    def wait() -> None:
        barrier.wait()

    def process(rank: int) -> None:
        share = WorkShare(rank, 2, wait)
        results[rank] = cache([data], encoders[rank], share=share)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    first, second = (set(one.captions) for one in encoders)
    assert first & second == {""}  # kept in memory by each
    assert (len(first), len(second)) == (33, 33)
    for text in {*texts.values(), ""}:
        one, other = (results[rank][0].load(text) for rank in range(2))
        torch.testing.assert_close(one.hidden_TD, other.hidden_TD)


# ---- the layout


def test_the_layout_of_the_real_model() -> None:
    specs = (TextEncoderSpec(), TextEncoderSpec(1280, 5120, 20, 32, projection_width=1280))
    for length, tokens in ((None, 77), (75, 77), (150, 152), (225, 227)):
        layout = layout_of(specs, TextSettings(length))
        assert layout.shapes() == {"hidden_state1": (tokens, 768), "hidden_state2": (tokens, 1280), "pool2": (1280,)}
    assert layout.size_bytes == 4 * (227 * 2048 + 1280)


def test_a_layout_without_pooled_vector() -> None:
    layout = TextLayout(77, (8,), None)
    outputs = TextOutputs(torch.randn(77, 8), None)
    arrays = layout.arrays(outputs)
    assert list(arrays) == ["hidden_state1"]
    back = layout.outputs(list(arrays.values()))
    assert torch.equal(back.hidden_TD, outputs.hidden_TD)
    assert back.pooled_P is None


def test_an_empty_store_says_which_caption_is_missing() -> None:
    with pytest.raises(KeyError, match="a cat"):
        TextStore(TextLayout(77, (8,), None), {}).load("a cat")
