"""Words that stand for vectors: files, whole words, conflicts, and one text for each layer."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.generation.embeddings import attach_embeddings
from library.generation.engine import Engine
from library.log import UserError
from library.models.layer_texts import cross_attentions
from library.options.generation import PromptOptions
from library.text.embedding_files import XTI_LAYERS
from library.text.triggers import TriggerTokenizer, add_vectors, is_taken
from tests.generation_fixtures import error, make_engine, make_job, picture

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "textual_inversion_sd1_narrow.safetensors"
BOS, EOS, FIRST = 49406, 49407, 49408


def rows(count: int, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.5


def attach(engine: Engine, *files: Path, xti: list[Path] | None = None) -> None:
    names = [str(file) for file in files] or None
    by_layer = None if xti is None else [str(file) for file in xti]
    attach_embeddings(engine, PromptOptions(textual_inversion_embeddings=names, XTI_embeddings=by_layer))


def write(path: Path, **tensors: Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def ids(engine: Engine, text: str, encoder: int = 0) -> list[int]:
    from library.text.tokens import TextSettings

    row = engine.family.tokenize([text], TextSettings(weighted_captions=True)).rows[encoder].ids_BNT[0, 0].tolist()
    return row[1 : row.index(EOS)]


# ---- files


def test_all_kinds_of_files_of_sd1(tmp_path: Path) -> None:
    vectors = rows(2)
    files = [
        write(tmp_path / "sksa.safetensors", emb_params=vectors),
        write(tmp_path / "sksb.pt", emb_params=vectors),
        tmp_path / "sksc.pt",
        tmp_path / "sksd.pt",
        write(tmp_path / "skse.bin", **{"<thing>": vectors[0]}),
    ]
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 3}, files[2])
    held = nn.ParameterDict({"*": nn.Parameter(vectors)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}, files[3])
    engine = make_engine()
    attach(engine, *files)
    table: Tensor = engine.parts.text_encoders[0].get_input_embeddings().weight  # type: ignore[operator]
    assert len(table) == FIRST + 9
    for index in range(4):
        assert torch.equal(table[FIRST + 2 * index : FIRST + 2 * index + 2], vectors)
    assert torch.equal(table[-1], vectors[0])
    assert ids(engine, "skse, sksb") == [FIRST + 8, 267, FIRST + 2, FIRST + 3]


def test_golden_file(tmp_path: Path) -> None:
    file = tmp_path / "sksx.safetensors"
    shutil.copy(GOLDEN, file)
    engine = make_engine("sd2")  # of the file's width
    attach(engine, file)
    assert ids(engine, "a sksx cat") == [320, FIRST, FIRST + 1, FIRST + 2, FIRST + 3, 2368]
    table: Tensor = engine.parts.text_encoders[0].get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(table[FIRST:], load_file(GOLDEN)["emb_params"])


def test_sdxl_has_vectors_for_both_encoders(tmp_path: Path) -> None:
    file = write(tmp_path / "sksx.safetensors", clip_l=rows(2), clip_g=rows(2, 64))
    engine = make_engine("sdxl")
    attach(engine, file)
    for encoder, key in enumerate(("clip_l", "clip_g")):
        assert ids(engine, "sksx", encoder) == [FIRST, FIRST + 1]
        table: Tensor = engine.parts.text_encoders[encoder].get_input_embeddings().weight  # type: ignore[operator]
        assert torch.equal(table[FIRST:], load_file(file)[key])
    plain = picture(make_engine("sdxl"), make_job("a sksx"))
    assert error(picture(engine, make_job("a sksx")), plain) > 1e-3
    assert np.array_equal(picture(engine, make_job("a cat")), picture(make_engine("sdxl"), make_job("a cat")))


@pytest.mark.parametrize(
    ("kind", "tensors", "says"),
    [
        ("sd1", {"emb_params": rows(1, 48)}, "vectors of width 48 for a text encoder of width 32"),
        ("sd1", {"clip_l": rows(1), "clip_g": rows(1, 64)}, "was made for SDXL"),
        ("sd1", {name: rows(1) for name in XTI_LAYERS}, "give it to --XTI_embeddings"),
        ("sd1", {"emb_params": torch.zeros(2, 3, 4)}, "holds no embedding"),
        ("sdxl", {"emb_params": rows(1)}, "has no clip_l and clip_g"),
        ("sdxl", {"clip_l": rows(1), "clip_g": rows(2, 64)}, "1 vectors in clip_l and 2 in clip_g"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, kind: str, tensors: dict[str, Tensor], says: str) -> None:
    file = write(tmp_path / "sksx.safetensors", **tensors)
    with pytest.raises(UserError) as caught:
        attach(make_engine(kind), file)
    assert says in str(caught.value)
    assert "sksx.safetensors" in str(caught.value)


def test_words_that_cannot_be_told_apart(tmp_path: Path) -> None:
    one = write(tmp_path / "sksx.safetensors", v=rows(3))
    same = write(tmp_path / "sksx.pt", v=rows(1))
    numbered = write(tmp_path / "sksx2.pt", v=rows(1))
    known = write(tmp_path / "cat.pt", v=rows(1))
    for files, says in [
        ((one, same), "sksx.pt: the word sksx is that of"),
        ((one, numbered), "sksx2.pt: the word sksx2 is that of"),
        ((known,), "cat is a word that the model knows"),
    ]:
        with pytest.raises(UserError, match=says):
            attach(make_engine(), *files)


# ---- words


def test_words_stand_alone_and_case_counts(tmp_path: Path) -> None:
    engine = make_engine()
    attach(engine, write(tmp_path / "sksX.pt", v=rows(2)), write(tmp_path / "bad-hands-5.pt", v=rows(1)))
    both = [FIRST, FIRST + 1]
    for text in ("sksX", "(sksX:1.3)", "sksX,", "[sksX]", "sksX-"):
        assert [index for index in ids(engine, text) if index >= FIRST] == both
    for text in ("sksx", "asksX", "sksXy", "sksX_", "SKSX", "bad-hands-55", "bad hands 5"):
        assert max(ids(engine, text)) < FIRST
    assert ids(engine, "bad-hands-5") == [FIRST + 2]
    assert ids(engine, "a sksX1") == [320, FIRST + 1]  # a single vector by its number
    rest = "a photo, of. a (cat:1.2) 日本 &amp; cat's"
    assert ids(engine, rest) == ids(make_engine(), rest)


def test_tokenizers_of_other_runs_know_nothing(tmp_path: Path) -> None:
    engine = make_engine()
    family, own = engine.family, engine.family.tokenizers[0]
    attach(engine, write(tmp_path / "sksx.pt", v=rows(1)))
    assert engine.family is not family
    assert family.tokenizers[0] is own
    assert len(own) == FIRST
    assert not is_taken(own, "sksx")
    assert max(ids(make_engine(), "sksx")) < FIRST


def test_vectors_act_like_any_words(tmp_path: Path) -> None:
    engine = make_engine()
    table: Tensor = engine.parts.text_encoders[0].get_input_embeddings().weight  # type: ignore[operator]
    cat_dog = ids(engine, "cat dog")
    attach(engine, write(tmp_path / "sksx.pt", v=table[cat_dog].clone()))
    expected = picture(make_engine(), make_job("a (cat dog:1.3)", negative="cat dog"))
    assert np.array_equal(picture(engine, make_job("a (sksx:1.3)", negative="sksx")), expected)


def test_adding_vectors_keeps_type_and_the_rest() -> None:
    encoder = copy.deepcopy(make_engine().parts.text_encoders[0]).to(torch.bfloat16)
    before: Tensor = encoder.get_input_embeddings().weight.clone()  # type: ignore[operator]
    assert add_vectors(encoder, rows(2)) == FIRST
    after: nn.Embedding = encoder.get_input_embeddings()  # type: ignore[operator]
    assert (after.weight.dtype, after.num_embeddings, after.weight.requires_grad) == (torch.bfloat16, FIRST + 2, False)
    assert torch.equal(after.weight[:FIRST], before)


def test_meanings_can_differ_with_one_tokenizer() -> None:
    tokenizer: Any = make_engine().family.tokenizers[0]
    first = TriggerTokenizer(tokenizer, {"sksx": [1, 2]})
    second = first.with_meanings({"sksx": [3]})
    assert (first(["a sksx"], add_special_tokens=False), second(["a sksx"], add_special_tokens=False)) == (
        {"input_ids": [[320, 1, 2]]},
        {"input_ids": [[320, 3]]},
    )


# ---- one text for each layer


def xti_file(path: Path, count: int = 2, same: bool = False) -> Path:
    return write(path, **{name: rows(count, seed=0 if same else index) for index, name in enumerate(XTI_LAYERS)})


def test_each_layer_gets_its_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, file = make_engine(), xti_file(tmp_path / "sksx.safetensors")
    attach(engine, xti=[file])
    seen: list[Tensor] = []
    layers = cross_attentions(engine.parts.unet)
    handles = [
        layer.to_k.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
        for layer in layers
    ]
    with_word = picture(engine, make_job("a sksx", steps=2))
    for handle in handles:
        handle.remove()
    assert len(layers) == len(XTI_LAYERS) == 16
    for index in (0, 6, 15):
        single = make_engine()  # it knows the word by this layer's vectors alone
        attach(single, write(tmp_path / f"{index}" / "sksx.pt", v=rows(2, seed=index)))
        torch.testing.assert_close(seen[index], single.condition([make_job("a sksx")]).hidden_BTD)
    same = make_engine()
    attach(same, xti=[xti_file(tmp_path / "same" / "sksx.safetensors", same=True)])
    plain = make_engine()
    attach(plain, write(tmp_path / "plain" / "sksx.pt", v=rows(2)))
    alike = picture(plain, make_job("a sksx", steps=2))
    assert error(picture(same, make_job("a sksx", steps=2)), alike) < 1e-5
    assert error(with_word, alike) > 1e-3


def test_layers_order_is_that_of_the_picture() -> None:
    unet = make_engine().parts.unet
    places = {module: path for path, module in unet.named_modules()}
    starts = [places[layer].split(".")[0] for layer in cross_attentions(unet)]
    assert starts == ["down_blocks"] * 6 + ["mid_block"] + ["up_blocks"] * 9


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("sdxl", {}, "are for SD 1.x and 2.x"),
        ("sd1", {"IN01": None}, "must have exactly IN01, IN02"),
        ("sd1", {"IN01": rows(3)}, "different numbers of vectors"),
        ("sd1", {"IN01": rows(2, 48)}, "vectors of width 48"),
    ],
)
def test_layer_files_that_do_not_fit(tmp_path: Path, kind: str, change: dict[str, Any], says: str) -> None:
    tensors = {name: rows(2) for name in XTI_LAYERS} | change
    file = write(tmp_path / "sksx.safetensors", **{key: value for key, value in tensors.items() if value is not None})
    with pytest.raises(UserError, match=says):
        attach(make_engine(kind), xti=[file])


def test_texts_without_the_word_and_regions(tmp_path: Path) -> None:
    engine = make_engine()
    attach(engine, xti=[xti_file(tmp_path / "sksx.safetensors")])
    assert np.array_equal(picture(engine, make_job("a cat")), picture(make_engine(), make_job("a cat")))
    with pytest.raises(UserError, match="cannot be used in regions"):
        picture(engine, make_job("a sksx AND a cat", mask="mask.png"))
