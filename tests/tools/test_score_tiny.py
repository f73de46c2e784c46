"""The score of a model: a perfect painter gets everything right, one that mixes the prompts up does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from library.generation import scoring
from library.rng import stream
from library.scenes.drawing import draw
from library.scenes.scoring import questions, subject_questions
from tests.toy import write_toy_checkpoint
from tools.score_tiny import main

COUNT = 30


def paint(monkeypatch: pytest.MonkeyPatch, order: Sequence[int], subject: str | None = None) -> None:
    """Let the asked-for scenes be drawn in this order instead of a model's pictures."""
    asked = questions(COUNT, stream(1, "questions"))
    if subject:
        told = [subject_questions(subject, word, COUNT, stream(1, "subject questions")) for word in ("sks", "")]
        asked = [*told[0], *told[1], *asked]

    def run(script: object, argv: list[str]) -> int:
        lines = Path(argv[argv.index("--from_file") + 1]).read_text("utf-8").splitlines()
        assert [line.split(" --d ")[0] for line in lines] == [question.prompt for question in asked]
        for place, index in enumerate(order):
            picture = Image.fromarray(draw(asked[index].scene, stream(0, "shades", index)))
            picture.save(Path(argv[argv.index("--outdir") + 1]) / f"im_{place:06d}.png")
        return 0

    monkeypatch.setattr(scoring, "run", run)


def scores(tmp_path: Path, *more: str) -> dict[str, dict[str, float]]:
    out = tmp_path / "score.json"
    assert main(["--ckpt", "any", "--count", str(COUNT), "--out_json", str(out), *more]) == 0
    found = json.loads(out.read_text("utf-8"))["5"]
    return {kind: {name: value[0] for name, value in answers.items()} for kind, answers in found.items()}


def test_a_perfect_painter_and_a_confused_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(monkeypatch, range(COUNT))
    assert set(scores(tmp_path)["others"].values()) == {1.0}
    paint(monkeypatch, [(index + 7) % COUNT for index in range(COUNT)])
    confused = scores(tmp_path)["others"]
    assert confused["count"] == 1.0
    assert max(confused[name] for name in ("ground", "colour", "shape")) < 0.4


def test_a_subject_is_found_where_its_word_is_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moons, others = [*range(COUNT)], [*range(2 * COUNT, 3 * COUNT)]
    paint(monkeypatch, [*moons, *others, *others], "moon")
    taught = scores(tmp_path, "--subject", "moon")
    assert set(taught["subject"].values()) == {1.0}
    assert taught["wordless"] == {"moon": 0.0}
    assert taught["others"]["shape"] == 1.0
    assert taught["others"]["moon"] == 0.0
    paint(monkeypatch, moons * 3, "moon")  # moons, whatever was asked for
    spoilt = scores(tmp_path, "--subject", "moon")
    assert spoilt["subject"]["shape"] == 1.0
    assert spoilt["wordless"] == {"moon": 1.0}
    assert spoilt["others"]["shape"] == 0.0
    assert spoilt["others"]["moon"] == 1.0


def test_pictures_of_a_model_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_toy_checkpoint(tmp_path / "toy.safetensors")
    argv = ["--ckpt", str(model), "--count", "3", "--steps", "2", "--scales", "1", "3", "--batch_size", "2"]
    assert main([*argv, "--outdir", str(tmp_path / "pictures")]) == 0
    said = capsys.readouterr().out
    assert "guidance scale 1, 3 prompts" in said
    assert "guidance scale 3, 3 prompts" in said
    assert len(list((tmp_path / "pictures" / "3").glob("*.png"))) == 3


def test_what_the_pictures_are_drawn_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(scoring, "run", lambda script, argv: given.append(argv) or 1)
    extras = ["--network_weights", "net.pt", "--network_module", "networks.lokr", "--sampler", "ddim"]
    extras += ["--textual_inversion_embeddings", "word.pt", "--steps", "7", "--batch_size", "3"]
    assert main(["--ckpt", "any", "--count", "2", "--outdir", str(tmp_path), *extras]) == 1
    for name, value in zip(extras[::2], extras[1::2], strict=True):
        assert given[0][given[0].index(name) + 1] == value


def test_pictures_of_an_earlier_score_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "5").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "5" / "im_000000.png")
    assert main(["--ckpt", "any", "--count", "1", "--outdir", str(tmp_path)]) == 1
    assert "pictures in it already" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ckpt", str(tmp_path / "none.safetensors"), "--count", "2"]) == 1
    assert "none.safetensors" in capsys.readouterr().err
