"""Captions by BLIP and GIT: independent of batches, one file an image, no bad image ends a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.options.preparation import BlipCaptionOptions, GitCaptionOptions
from library.options.preparation_scripts import MAKE_CAPTIONS_GIT
from library.options.script import parse
from library.preparation.blip import OwnDraws, load_captioner
from library.preparation.git_captions import GitCaptioner, without_read_words
from library.rng import torch_stream
from tests.captioner_fixtures import WORDS, write_blip, write_git
from tests.data_fixtures import write_picture
from tools.make_captions import main as make_captions
from tools.make_captions_by_git import main as make_captions_by_git

SHORT = ("--max_length", "12")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_blip(tmp_path_factory.mktemp("blip")))


@pytest.fixture(scope="module")
def git(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_git(tmp_path_factory.mktemp("git")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(5):
        write_picture(tmp_path / "in" / f"{number}.png", (40 + number, 30), number)
    return tmp_path / "in"


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.caption"))}


def captions(folder: Path, *options: str) -> dict[str, str]:
    for path in folder.glob("*.caption"):
        path.unlink()
    assert make_captions([str(folder), *SHORT, *options]) == 0
    return texts(folder)


def test_a_caption_depends_on_the_seed_and_the_image_only(photos: Path, blip: str):
    alone = captions(photos, "--caption_weights", blip)
    assert len(alone) == 5
    assert len(set(alone.values())) > 2  # they are draws
    assert all(set(text.split()) <= set(WORDS) and text.endswith("\n") for text in alone.values())
    assert captions(photos, "--caption_weights", blip, "--batch_size", "3") == alone
    assert captions(photos, "--caption_weights", blip, "--max_data_loader_n_workers", "0") == alone
    (photos / "0.png").unlink()
    assert captions(photos, "--caption_weights", blip) == {name: alone[name] for name in alone if name != "0"}
    assert captions(photos, "--caption_weights", blip, "--seed", "1") != {**alone}


def test_beam_search_draws_nothing(photos: Path, blip: str):
    beams = ("--beam_search", "--num_beams", "3", "--caption_weights", blip)
    assert captions(photos, *beams) == captions(photos, *beams, "--seed", "1", "--batch_size", "5")


def test_the_shortest_and_longest_caption(photos: Path, blip: str):
    """Both count the prompt: its mark and three words."""
    counts = [len(text.split()) for text in captions(photos, "--caption_weights", blip, "--min_length", "12").values()]
    assert counts == [8] * 5


def test_the_square_of_the_model_and_its_normalisation(blip: str):
    captioner = load_captioner(BlipCaptionOptions(caption_weights=blip))
    white = torch.full((20, 50, 3), 255, dtype=torch.uint8).numpy()
    prepared = captioner.prepare(white)
    assert prepared.shape == (3, 32, 32)
    expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    assert torch.allclose(prepared.mean((1, 2)), expected, atol=1e-5)


def test_draws_come_from_the_nucleus_with_its_probabilities():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch_stream(0, "test")
    process = OwnDraws(0.75, [generator])
    drawn = Counter(int(process(torch.zeros(1, 1, dtype=torch.long), scores).argmax()) for _ in range(4000))  # type: ignore[arg-type]
    assert set(drawn) == {0, 1}  # 0.5 alone is less than 0.75; with 0.3 it is more
    assert drawn[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)


def test_existing_captions_may_stay(photos: Path, blip: str, caplog: pytest.LogCaptureFixture):
    (photos / "1.caption").write_text("mine")
    with caplog.at_level("INFO"):
        assert make_captions([str(photos), "--caption_weights", blip, *SHORT, "--skip_existing"]) == 0
    assert texts(photos)["1"] == "mine"
    assert "captions written: 4, left alone: 1" in caplog.text
    assert make_captions([str(photos), "--caption_weights", "no/such", "--skip_existing"]) == 0  # nothing to load for
    assert captions(photos, "--caption_weights", blip)["1"] != "mine"


def test_bad_images_are_named_and_passed_over(photos: Path, blip: str, caplog: pytest.LogCaptureFixture):
    (photos / "1.png").write_bytes(b"")
    assert set(captions(photos, "--caption_weights", blip, "--batch_size", "2")) == {"0", "2", "3", "4"}
    assert "1.png" in caplog.text
    for number in (0, 2, 3, 4):
        (photos / f"{number}.png").write_bytes(b"no image")
    assert make_captions([str(photos), "--caption_weights", blip]) == 1


@pytest.mark.parametrize(
    "weights", ["model_large_caption.pth", "https://example.com/BLIP/model_large_caption.pth", "a/b/c"]
)
def test_other_forms_of_weights_are_refused(photos: Path, weights: str, capsys: pytest.CaptureFixture[str]):
    assert make_captions([str(photos), "--caption_weights", weights]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: --caption_weights")
    assert ("Salesforce/blip-image-captioning-large" in message) == weights.endswith(".pth")


def test_the_copy_on_this_machine_comes_first_then_the_hub(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[bool] = []

    def fail(name: str, local_files_only: bool = False) -> None:
        asked.append(local_files_only)
        raise OSError("We couldn't connect\nmore lines")

    monkeypatch.setattr("library.preparation.blip.BlipForConditionalGeneration.from_pretrained", fail)
    assert make_captions([str(photos), "--caption_weights", "owner/name"]) == 1
    assert asked == [True, False]
    message = capsys.readouterr().err
    assert "--caption_weights owner/name: no such folder here" in message
    assert "more lines" not in message


def test_git_needs_no_draws(photos: Path, git: str):
    words = [str(photos), "--model_id", git, "--max_length", "10"]
    assert make_captions_by_git(words) == 0
    alone = texts(photos)
    assert len(set(alone.values())) > 2
    assert make_captions_by_git([*words, "--batch_size", "4"]) == 0
    assert texts(photos) == alone
    assert make_captions_by_git([str(photos), "--model_id", str(photos)]) == 1


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ('a shirt with the word "love you" on the front', "a shirt "),
        ("a shirt with the letters abc", "a shirt "),
        ('a man has the name " bob" is on his back', "a man  back"),
        ("a cup and the words hello on her shirt", "a cup "),
        ('a dog with a sign that says "stop" on it', "a dog "),
        ("a dog that says stop", "a dog "),
        ("a cat that says 'i'm a cat' on it", "a cat "),
        ("a player with the number 12 on it", "a player "),
        ("a player with the number 7 on his shirt", "a player "),
        ('a page with the words "', "a page "),
        ("a flag word peace on it", "a flag "),
        ("a box that says'the word \" on it", "a box "),
        ("a photo of a cat with big eyes", "a photo of a cat with big eyes"),
        ("words on the wall", "words on the wall"),
    ],
)
def test_what_is_read_in_pictures_is_taken_out(caption: str, left: str):
    assert without_read_words(caption) == left


@pytest.mark.parametrize(("more", "text"), [((), "a dog that says stop"), (("--remove_words",), "a dog ")])
def test_remove_words_acts_on_what_the_model_says(more: tuple[str, ...], text: str):
    settings = parse(MAKE_CAPTIONS_GIT, ["photos", *more])
    model = SimpleNamespace(device="cpu", generate=lambda **_: torch.zeros(1, 3))
    tokenizer = SimpleNamespace(batch_decode=lambda tokens, **_: ["a dog that says stop"] * len(tokens))
    captioner = GitCaptioner(model, tokenizer, None, settings[GitCaptionOptions])
    assert captioner.captions(["a.png"], [torch.zeros(3, 4, 4)]) == [text]


def test_the_smaller_the_nucleus_the_fewer_draws(photos: Path, blip: str):
    likeliest = captions(photos, "--caption_weights", blip, "--top_p", "1e-6")
    assert captions(photos, "--caption_weights", blip, "--top_p", "1e-6", "--seed", "1") == likeliest
    assert captions(photos, "--caption_weights", blip, "--top_p", "1") != likeliest
