"""Prompt lines: the text and its in-line options, ``a cat --n blurry --w 512 --d 1,2 --am 0.8``.

A line is cut at every blank followed by two dashes. Values that cannot be read keep the default and are reported, as
are options that do not exist; what cannot be drawn at all raises.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.generation.samplers import MAX_STEPS, SAMPLER_NAMES
from library.log import UserError

SWITCHED_OFF = "none"
_CUT = " --"
_PIECE = re.compile(r"(?P<letters>[A-Za-z]+\d?) +(?P<value>\S.*)", re.DOTALL)
_ESCAPED_BYTE = re.compile("[\ud800-\udfff]")  # Python's stand-ins for bytes of another encoding
_UINT, _NUM, _UINTS, _NUMS = (
    re.compile(pattern) for pattern in (r"\d+", r"[\d.]+", r"[\d,]+", r"[-\d.]+(?:,[-\d.]+)*,?")
)


@dataclass(frozen=True, slots=True)
class PromptLine:
    """A line as read. ``options`` holds what the line gives, by the names below; what it does not give is absent.

    ``notes``: what the user should know of the line.
    """

    raw: str
    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()


def parse_line(raw: str) -> PromptLine:
    """Read a line after its variants were chosen. Raises UserError for a value with which nothing can be drawn."""
    text = raw.strip()
    if _ESCAPED_BYTE.search(text):
        raise UserError("there are letters in it that are not UTF-8; set the terminal to UTF-8")
    prompt, *pieces = text.split(_CUT)
    options: dict[str, Any] = {}
    notes: list[str] = []
    for piece in pieces:
        _read_piece(piece, options, notes)
    return PromptLine(text, prompt, options, tuple(notes))


def _read_piece(piece: str, options: dict[str, Any], notes: list[str]) -> None:
    match = _PIECE.match(piece)
    letters = match["letters"].lower() if match else ""
    if match is None or letters not in _OPTIONS:
        word = piece.split(" ")[0]
        if word.lower() in _OPTIONS:
            notes.append(f"--{word}: a blank and a value must follow; it is left out")
        else:
            near = difflib.get_close_matches(word.lower(), _OPTIONS, 1)
            hint = f", did you mean --{near[0]}?" if near else ""
            notes.append(f"there is no in-line option --{word}{hint}; it is left out")
        return
    name, read = _OPTIONS[letters]
    try:
        options[name] = read(match["value"])
    except ValueError as error:
        notes.append(f"--{letters} {match['value'].strip()}: {error}; the default is used")


# ---- values


def _matched(pattern: re.Pattern[str], value: str) -> str:
    found = pattern.match(value)
    if found is None:
        raise ValueError("is no such value")
    return found.group()


def _uint(value: str) -> int:
    try:
        return int(_matched(_UINT, value))
    except ValueError:
        raise ValueError("must be a whole number") from None


def _num(value: str) -> float:
    try:
        return float(_matched(_NUM, value))
    except ValueError:
        raise ValueError("must be a number") from None


def _whole(value: str) -> int:
    number = _num(value)
    if not number.is_integer():
        raise ValueError("must be a whole number")
    return int(number)


def _steps(value: str) -> int:
    return max(1, min(MAX_STEPS, _uint(value)))


def _seeds(value: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in _matched(_UINTS, value).split(","))
    except ValueError:
        raise ValueError("must be whole numbers separated by commas") from None
    if max(seeds) >= 2**63:
        raise ValueError("seeds must be below 2^63")
    return seeds


def _nums(value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _matched(_NUMS, value).split(","))
    except ValueError:
        raise ValueError("must be numbers separated by commas") from None


def _strength(value: str) -> float:
    number = _num(value)
    if not 0 <= number <= 1:
        raise UserError(f"--t {value.strip()}: the strength must be from 0 to 1")
    return number


def _count(value: str) -> int:
    number = _whole(value)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def _share(value: str) -> float:
    number = _num(value)
    if not 0 < number <= 1:
        raise ValueError("must be above 0 and at most 1")
    return number


def _unsharp(value: str) -> tuple[float, ...]:
    return unsharp_params(_nums(value))


def unsharp_params(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """ksize, sigma, strength, and 1 if the target is sharpened, 0 if the source is; 1 when absent. Raises UserError."""
    if len(numbers) not in (3, 4) or numbers[0] < 0 or not float(numbers[0]).is_integer():
        raise UserError("--glus: needs ksize,sigma,strength or ksize,sigma,strength,target_x with a whole ksize")
    if numbers[0] and numbers[0] % 2 == 0:
        raise UserError(f"--glus: the kernel's size must be odd, not {numbers[0]:g}")
    return (*numbers, 1.0)[:4]


def _or_off(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """The value, or the word none, which switches the feature off for this line."""
    return lambda value: SWITCHED_OFF if value.strip().lower() == SWITCHED_OFF else read(value)


def _sampler(value: str) -> str:
    name = value.strip().lower()
    if name not in SAMPLER_NAMES:
        raise ValueError(f"is no sampler; choose one of {', '.join(SAMPLER_NAMES)}")
    return name


_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", _uint),
    "h": ("height", _uint),
    "ow": ("original_width", _uint),
    "oh": ("original_height", _uint),
    "nw": ("original_width_negative", _uint),
    "nh": ("original_height_negative", _uint),
    "ct": ("crop_top", _uint),
    "cl": ("crop_left", _uint),
    "s": ("steps", _steps),
    "ss": ("sampler", _sampler),
    "d": ("seeds", _seeds),
    "l": ("scale", _num),
    "nl": ("negative_scale", _or_off(_num)),
    "t": ("strength", _strength),
    "c": ("clip_prompt", str),
    "am": ("multipliers", _nums),
    "dsd1": ("ds_depth_1", _or_off(_whole)),
    "dst1": ("ds_timesteps_1", _whole),
    "dsd2": ("ds_depth_2", _or_off(_whole)),
    "dst2": ("ds_timesteps_2", _whole),
    "dsr": ("ds_ratio", _share),
    "glt": ("gradual_latent_timesteps", _or_off(_whole)),
    "glr": ("gradual_latent_ratio", _share),
    "gle": ("gradual_latent_every_n_steps", _count),
    "gls": ("gradual_latent_ratio_step", _share),
    "glsn": ("gradual_latent_s_noise", _num),
    "glus": ("gradual_latent_unsharp_params", _unsharp),
}
