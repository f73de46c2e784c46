"""What a run draws in its previews is what the saved files draw elsewhere; one set of vectors for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.generation.embeddings import attach_embeddings
from library.models.layer_texts import cross_attentions, let_layers_choose
from library.options.generation import PromptOptions
from library.text.embedding_files import XTI_LAYERS
from tests.generation_fixtures import make_engine, make_job, picture, toy_model
from tests.parity.test_drawing_networks import pipeline
from tests.training.runs import tensors
from tests.words_fixtures import SGD, Trainer, distance, vocabulary, write_pictures

PROMPT = "a (photo:1.2) of sksx, sksx1"
PLAIN = "a photo of sksx"
ONE_STEP_OF_COLOUR = 1.01 / 255


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def fit(
    tmp_path: Path, model: Path, model_sd2: Path, model_sdxl: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    models = {"sd1": model, "sd2": model_sd2, "sdxl": model_sdxl}
    return Trainer(tmp_path, models, pictures, monkeypatch)


def train_and_draw(fit: Trainer, tmp_path: Path, kind: str) -> tuple[Path, list[np.ndarray]]:
    """The saved file and the last previews of two prompts; the earlier ones, of untrained words, must differ."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{text} --n blurry --w 64 --h 64 --d 3 --s 3 --l 5\n" for text in (PROMPT, PLAIN)))
    status, out = fit.run(
        kind, "--num_vectors_per_token", "2", "--sample_prompts", str(prompts), "--sample_every_n_steps", "4",
        "--sample_at_first", "--sample_sampler", "euler", "--learning_rate", "0.5", "--output_name", "sksx",
    )  # fmt: skip
    assert status == 0
    early, late = (sorted((out / "sample").glob(f"sksx_{moment}_*")) for moment in ("e000000", "000004"))
    before, after = (
        [np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files] for files in (early, late)
    )
    assert len(before) == len(after) == 2
    assert np.abs(after[1] - before[1]).max() > 0.01
    return out / "sksx.safetensors", after


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "xti"])
def test_the_generator_draws_the_preview(fit: Trainer, tmp_path: Path, kind: str) -> None:
    file, drawn = train_and_draw(fit, tmp_path, kind)
    engine = make_engine("sdxl" if kind == "sdxl" else "sd1")
    option = "XTI_embeddings" if kind == "xti" else "textual_inversion_embeddings"
    attach_embeddings(engine, PromptOptions(**{option: [str(file)]}))
    for text, preview in zip((PROMPT, PLAIN), drawn, strict=True):
        ours = picture(engine, make_job(text))[0]
        assert np.abs(ours - preview).max() < ONE_STEP_OF_COLOUR
    if kind != "xti":
        theirs = drawn_by_diffusers(kind, file)
        assert np.abs(theirs - drawn[1]).max() < ONE_STEP_OF_COLOUR


def drawn_by_diffusers(kind: str, file: Path) -> np.ndarray:
    """The plain prompt, by diffusers' pipeline that has loaded the file in its own way."""
    pipe = pipeline(kind, toy_model(kind))
    if kind == "sdxl":
        saved = tensors(file)
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipe, f"text_encoder{number}"), getattr(pipe, f"tokenizer{number}")
            pipe.load_textual_inversion(saved[key], token="sksx", text_encoder=encoder, tokenizer=tokenizer)
    else:
        pipe.load_textual_inversion(str(file), token="sksx")
    return pipe(
        PLAIN, negative_prompt="blurry", width=64, height=64, num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3), output_type="np",
    ).images[0]  # fmt: skip


# ---- a set of vectors for each layer


@pytest.mark.parametrize("kind", ["xti", "xti2"])
def test_every_layer_learns_vectors_of_its_own(fit: Trainer, kind: str) -> None:
    """Vector i of every layer begins as token i, and each layer goes its own way."""
    saved = fit(kind, "--num_vectors_per_token", "2", "--init_word", "cute cat")
    assert fit.loaded is not None
    began_VD = vocabulary(fit.loaded)[0][[2242, 2368]]
    assert list(saved) == sorted(XTI_LAYERS)
    changes = [saved[name] - began_VD for name in XTI_LAYERS]
    assert all(bool((change.abs().amax(dim=1) > 1e-3).all()) for change in changes)
    assert len({tuple(change.flatten().tolist()) for change in changes}) == 16


def test_layers_start_from_their_own_file(fit: Trainer, tmp_path: Path) -> None:
    first = fit("xti", "--num_vectors_per_token", "3", "--learning_rate", "0.5", "--max_train_steps", "1")
    still = ("--learning_rate", "1e-12", "--max_train_steps", "1")
    file = tmp_path / "layers.pt"
    torch.save({name: first[name] for name in reversed(XTI_LAYERS)}, file)  # the order in a file means nothing
    again = fit("xti", *still, "--weights", str(file))
    assert distance(first, again) < 1e-6
    assert fit.run("sd1", "--weights", str(file))[0] == 1


def test_checkpointing_changes_nothing_for_layers(fit: Trainer) -> None:
    """In the backward pass, where activations are computed again, each layer must hear its own text again."""
    more = ("--learning_rate", "1", "--init_word", "cat", "--max_token_length", "150", "--weighted_captions", *SGD)
    more += ("--cache_latents", "--max_train_steps", "1")
    one = fit("xti", "--train_batch_size", "2", *more)
    other = fit("xti", "--train_batch_size", "2", "--gradient_checkpointing", *more)
    assert fit.loaded is not None
    began = dict.fromkeys(one, vocabulary(fit.loaded)[0][[2368]])
    assert distance(one, began) > 1e-3
    assert distance(one, other) < 1e-5 * distance(one, began)


def test_each_layer_picks_its_text_and_plain_texts_pass() -> None:
    unet: Any = toy_model("sd1").unet
    latents_BCHW, texts_BSTD = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 77, 32)
    plain = unet(latents_BCHW, 5, texts_BSTD[:, 0]).sample
    let_layers_choose(unet)
    heard: list[Tensor] = []
    for layer in cross_attentions(unet):
        layer.to_k.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))  # type: ignore[union-attr]
    assert torch.equal(unet(latents_BCHW, 5, texts_BSTD[:, 0]).sample, plain)
    heard.clear()
    unet(latents_BCHW, 5, texts_BSTD)
    assert len(heard) == 16
    assert all(torch.equal(text_BTD, texts_BSTD[:, index]) for index, text_BTD in enumerate(heard))
