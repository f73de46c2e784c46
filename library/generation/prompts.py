"""Prompt files: what to draw, one picture a prompt. Plain text, TOML or JSON; problems name the file and the line.

A line of a text file is the prompt, then options: ``a cat --n blurry --w 512 --h 768 --d 1 --s 28 --l 7.5 --ss ddim``
(negative prompt, width, height, seed, steps, guidance scale, sampler; ``--cn edges.png`` is a picture to draw after).
Only what begins with a blank and two dashes followed by a letter is an option.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.generation.samplers import MAX_STEPS, SAMPLER_NAMES
from library.log import UserError, nearest
from library.options.toml_file import parse_toml

_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """One picture to draw; fields are the keys of TOML and JSON files. None: the family's or the program's default.

    ``width`` and ``height`` in pixels; ``seed`` None draws a fresh one; ``scale`` is the guidance scale;
    ``controlnet_image`` is a file for the net that is trained.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int = 30
    scale: float = 7.5
    sample_sampler: str | None = None
    controlnet_image: str | None = None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return read


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("must be a number") from None


def _sampler(value: Any) -> str:
    if value not in SAMPLER_NAMES:
        raise ValueError(f"is no sampler; choose one of {', '.join(SAMPLER_NAMES)}")
    return value


_READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "width": _whole(1, 16384),
    "height": _whole(1, 16384),
    "seed": _whole(0, 2**63 - 1),
    "sample_steps": _whole(1, MAX_STEPS),
    "scale": _number,
    "sample_sampler": _sampler,
    "controlnet_image": _text,
}
_LETTERS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "ss": "sample_sampler",
    "cn": "controlnet_image",
}


class NoPrompt(UserError):
    """A prompt file of the right form that holds no prompt."""


def load_prompts(path: str | Path) -> tuple[PromptSpec, ...]:
    """All prompts of a file, by its extension. Raises UserError with every problem of the file, `NoPrompt` if there is
    nothing in it.
    """
    path = Path(path)
    readers = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--sample_prompts {path}: must be a .txt, .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {path}: cannot be read as UTF-8 text ({error})") from error
    problems: list[str] = []
    prompts = reader(text, str(path), problems)
    if not problems and not prompts:
        raise NoPrompt(f"{path}: there is no prompt in it")
    if problems:
        raise UserError("\n".join(problems))
    return tuple(prompts)


def _parse_line(line: str, where: str, problems: list[str]) -> PromptSpec:
    first, *options = _OPTION.split(line.strip())
    values: dict[str, Any] = {"prompt": first.strip()}
    for option in options:
        letters, _, value = option.partition(" ")
        name = _LETTERS.get(letters.lower())
        if name is None:
            known = " ".join(f"--{key}" for key in _LETTERS)
            problems.append(f"{where}: there is no option --{letters.strip()} (options: {known})")
            continue
        values[name] = _read(name, value.strip(), f"{where}: --{letters} {value.strip()}", problems)
    return PromptSpec(**values)


def _read(name: str, value: Any, where: str, problems: list[str]) -> Any:
    try:
        return _READERS[name](value)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def _from_mapping(values: dict[str, Any], where: str, problems: list[str]) -> PromptSpec:
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name in _READERS:
            read[name] = _read(name, value, f"{where}: {name} = {value!r}", problems)
        else:
            hint = nearest(name, _READERS) or f" (keys: {', '.join(_READERS)})"
            problems.append(f"{where}: there is no key {name}{hint}")
    return PromptSpec(**read)


def _from_text(text: str, path: str, problems: list[str]) -> list[PromptSpec]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    return [
        _parse_line(line, f"{path} line {number}", problems)
        for number, line in lines
        if line and not line.startswith("#")
    ]


def _from_toml(text: str, path: str, problems: list[str]) -> list[PromptSpec]:
    try:
        document = parse_toml(text)
    except ValueError as error:
        problems.append(f"{path}: no valid TOML: {error}")
        return []
    table = document.get("prompt")
    if not isinstance(table, dict) or len(document) > 1:
        problems.append(f"{path}: needs one table [prompt], with tables [[prompt.subset]] in it, and nothing else")
        return []
    common: dict[str, Any] = {name: value for name, value in table.items() if name != "subset"}
    subsets: Any = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        problems.append(f"{path}: prompt.subset must be an array of tables, written [[prompt.subset]]")
        return []
    prompts: list[PromptSpec] = []
    for number, subset in enumerate(subsets, 1):
        where = f"{path} prompt.subset {number}"
        for name in sorted(common.keys() & subset.keys()):
            problems.append(f"{where}: {name} stands in [prompt] too; keep one of the two")
        prompts.append(_from_mapping({**common, **subset}, where, problems))
    return prompts


def _from_json(text: str, path: str, problems: list[str]) -> list[PromptSpec]:
    try:
        items: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        problems.append(f"{path}: no valid JSON: {error}")
        return []
    if not isinstance(items, list):
        problems.append(f"{path}: must be an array of texts or objects")
        return []
    prompts: list[PromptSpec] = []
    for number, item in enumerate(items, 1):
        where = f"{path} prompt {number}"
        if isinstance(item, str):
            prompts.append(_parse_line(item, where, problems))
        elif isinstance(item, dict):
            prompts.append(_from_mapping(item, where, problems))
        else:
            problems.append(f"{where}: must be a text or an object")
    return prompts
