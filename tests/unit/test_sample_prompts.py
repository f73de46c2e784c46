"""Prompt files: text with in-line options, TOML, JSON; and the errors they are answered with."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.generation.prompts import PromptSpec, load_prompts
from library.log import UserError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def parse_prompt_line(line: str) -> PromptSpec:
    """The prompt of a line, wherever it stands: here in a JSON file, which knows no comments and no blank lines."""
    with tempfile.TemporaryDirectory() as folder:
        (prompt,) = load_prompts(write(Path(folder), "p.json", json.dumps([line])))
    return prompt


def test_all_options_of_a_line() -> None:
    line = "1girl, (solo:1.2) --n low quality, (bad:1.3) --w 768 --h 512 --d 7 --s 28 --l 5.5 --ss euler_a"
    assert parse_prompt_line(line) == PromptSpec(
        "1girl, (solo:1.2)", "low quality, (bad:1.3)", 768, 512, 7, 28, 5.5, "euler_a"
    )


def test_a_picture_to_draw_after(tmp_path: Path) -> None:
    assert parse_prompt_line("a cat --cn my edges/1.png --d 3") == PromptSpec(
        "a cat", seed=3, controlnet_image="my edges/1.png"
    )
    (prompt,) = load_prompts(write(tmp_path, "p.json", '[{"prompt": "a", "controlnet_image": "e.png"}]'))
    assert prompt.controlnet_image == "e.png"


def test_defaults_and_case() -> None:
    assert parse_prompt_line("a cat") == PromptSpec("a cat", "", None, None, None, 30, 7.5, None)
    assert parse_prompt_line("a cat --W 64 --SS ddim").width == 64
    assert parse_prompt_line("--n only a negative") == PromptSpec("", "only a negative")


@pytest.mark.parametrize(
    "prompt", ["n like nothing", "s 5", "w 512, h 300", "x --", "a -- b", "well--known", "a --1", "d 3 --- l"]
)
def test_prompt_text_is_never_taken_for_options(prompt: str) -> None:
    assert parse_prompt_line(prompt) == PromptSpec(prompt)


@given(st.text(alphabet="ab ,:()n w5").map(str.strip), st.integers(1, 2000), st.integers(0, 2**40))
def test_lines_round_trip(prompt: str, width: int, seed: int) -> None:
    assert parse_prompt_line(f"{prompt} --w {width} --d {seed}") == PromptSpec(prompt, width=width, seed=seed)


def test_text_file_skips_blank_lines_and_comments(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeff# prompt 1\na cat --d 1\n\n   \n  # no\nein Schloß --d 2\r\n")
    assert [(p.prompt, p.seed) for p in load_prompts(path)] == [("a cat", 1), ("ein Schloß", 2)]


def test_all_problems_of_a_file_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "fine\na --zz 3\nb --s 5000\nc --w abc --l 7.5.1\nd --ss nope\n")
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 5
    for line, parts in zip(
        lines,
        [
            ("line 2", "--zz"),
            ("line 3", "--s 5000"),
            ("line 4", "--w abc"),
            ("line 4", "--l 7.5.1"),
            ("line 5", "euler"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line


def test_toml_merges_common_keys(tmp_path: Path) -> None:
    text = (
        '[prompt]\nwidth = 64\nscale = 5\n[[prompt.subset]]\nprompt = "a"\nseed = 1\n[[prompt.subset]]\nprompt = "b"\n'
    )
    first, second = load_prompts(write(tmp_path, "p.toml", text))
    assert (first.prompt, first.width, first.scale, first.seed) == ("a", 64, 5.0, 1)
    assert (second.prompt, second.width, second.seed) == ("b", 64, None)
    (single,) = load_prompts(write(tmp_path, "q.toml", '[prompt]\nprompt = "alone"\n'))
    assert single.prompt == "alone"


def test_json_of_texts_and_objects(tmp_path: Path) -> None:
    items = ["a cat --d 3", {"prompt": "a dog", "negative_prompt": "cat", "sample_steps": 5, "sample_sampler": "heun"}]
    first, second = load_prompts(write(tmp_path, "p.json", json.dumps(items)))
    assert (first.prompt, first.seed) == ("a cat", 3)
    assert second == PromptSpec("a dog", "cat", sample_steps=5, sample_sampler="heun")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "a", r"\.txt, \.toml or \.json"),
        ("p.txt", "# nothing\n", "no prompt"),
        ("p.json", "{}", "array"),
        ("p.json", "[1]", "prompt 1"),
        ("p.json", "[", "JSON"),
        ("p.json", '[{"promt": "a"}]', "did you mean prompt"),
        ("p.json", '[{"width": true}]', "whole number"),
        ("p.toml", "prompt = 1", "table"),
        ("p.toml", "[prompt]\nwidth = = 2", "line 2"),
        ("p.toml", "[prompt]\nsubset = 3", "array of tables"),
        ("p.toml", "[prompt]\nwidth = 1\n[[prompt.subset]]\nwidth = 2", "subset 1: width"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, name, text))


def test_missing_or_undecodable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(tmp_path / "bad.txt")
