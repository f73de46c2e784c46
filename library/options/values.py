"""Turning texts and TOML values into typed values. Each function raises ValueError that says what is wanted."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.log import UserError


@dataclass(frozen=True)
class Bounds:
    """The range of a number; None means no limit."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None

    def text(self) -> str:
        """The range in words, for messages and documentation."""
        parts: list[str] = []
        if self.ge is not None and self.le is not None:
            parts.append(f"from {self.ge} to {self.le}")
        elif self.ge is not None:
            parts.append(f"{self.ge} or more")
        elif self.le is not None:
            parts.append(f"{self.le} or less")
        if self.gt is not None:
            parts.append(f"above {self.gt}")
        if self.lt is not None:
            parts.append(f"below {self.lt}")
        if self.multiple_of is not None:
            parts.append(f"a multiple of {self.multiple_of}")
        return " and ".join(parts)

    def check(self, value: float) -> None:
        """Raise ValueError if the number is out of range."""
        inside = (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )
        if not inside:
            raise ValueError(f"must be {self.text()}")


def whole_number(raw: Any) -> int:
    """An int from an int, a float without a fraction, or text."""
    problem = ValueError("must be a whole number")
    if isinstance(raw, bool):
        raise problem
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if isinstance(raw, int):
        return raw
    if not isinstance(raw, str):
        raise problem
    try:
        return int(raw)
    except ValueError:
        raise problem from None


def number(raw: Any) -> float:
    """A finite float from a number or text."""
    problem = ValueError("must be a number")
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise problem
    try:
        value = float(raw)
    except ValueError:
        raise problem from None
    if not math.isfinite(value):
        raise problem
    return value


def text(raw: Any) -> str:
    """Text; numbers and booleans of a file are refused."""
    if isinstance(raw, str):
        return raw
    if isinstance(raw, Path):
        return str(raw)
    raise ValueError(f'must be text: write it in quotes, "{raw}"' if isinstance(raw, int | float) else "must be text")


def switch(raw: Any) -> bool:
    """A boolean; nothing else is taken for one."""
    if isinstance(raw, bool):
        return raw
    raise ValueError("must be true or false (without quotes)")


def path(raw: Any) -> Path:
    """A path from text."""
    return Path(text(raw))


_NEXT_KEY = re.compile(r"[\s,;]\s*[A-Za-z_]\w*\s*=(?!=)")

PARSERS: dict[type, Callable[[Any], Any]] = {int: whole_number, float: number, str: text, bool: switch, Path: path}


def check_choice(raw: Any, choices: tuple[Any, ...]) -> Any:
    """One of the choices; a number may come as text."""
    if not isinstance(raw, bool):
        for allowed in choices:
            if raw == allowed or (isinstance(raw, str) and raw == str(allowed)):
                return allowed
    raise ValueError(f"must be one of {', '.join(str(allowed) for allowed in choices)}")


def means_nothing(raw: Any, kind: type, is_word: bool) -> bool:
    """True if a value stands for "not given": empty text or list, and the word None unless it can be any word."""
    if raw == "" or raw == []:
        return True
    return isinstance(raw, str) and raw.lower() == "none" and (not is_word or kind in (int, float))


def split_pair(item: str) -> tuple[str, str]:
    """``key=value`` cut at the first equals sign; the value may contain more of them."""
    key, sign, value = item.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"item {item!r} must have the form key=value")
    return key.strip(), value.strip()


def word_pair(item: str) -> tuple[str, str]:
    """`split_pair` where a value is a word, a number or a list, so that ``a=1 b=2`` must be two items in one."""
    key, value = split_pair(item)
    if _NEXT_KEY.search(value):
        parts = (part.strip(" ,;") for part in re.split(f"(?={_NEXT_KEY.pattern})", item))
        apart = " ".join(f'"{part}"' for part in parts if part)
        raise ValueError(f"item {item!r} is one text with several arguments; give each its own quotes: {apart}")
    return key, value


def split_pairs(items: Iterable[str] | None, option_name: str) -> dict[str, str]:
    """``key=value`` items as texts by key. Raises UserError for an item without ``=`` and for a key given twice."""
    pairs: dict[str, str] = {}
    for item in items or ():
        try:
            key, value = split_pair(item)
        except ValueError as error:
            raise UserError(f"--{option_name}: {error}") from error
        if key in pairs:
            raise UserError(f"--{option_name}: {key} is given twice; keep one of them")
        pairs[key] = value
    return pairs


def argument_list(line: str, option_name: str) -> dict[str, str]:
    """``key=value;key=value`` as texts by key. Quotes keep a semicolon in a value: ``"prompt=a; b";scale=2``.

    Raises UserError.
    """
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace, lexer.whitespace_split = ";", True
    lexer.commenters, lexer.escape = "", ""
    try:
        items = list(lexer)
    except ValueError as error:
        raise UserError(f"--{option_name} {line}: a quotation mark is not closed") from error
    return split_pairs([item for item in items if item.strip()], option_name)


def _numbers(raw: Any, parse: Callable[[Any], Any]) -> list[Any]:
    if isinstance(raw, str):
        return [parse(part.strip()) for part in raw.split(",")]
    return [parse(part) for part in raw] if isinstance(raw, list | tuple) else [parse(raw)]


def training_size(raw: Any) -> tuple[int, int]:
    """``512``, ``"512,768"`` or ``[512, 768]`` as (width, height) in pixels."""
    try:
        sides = _numbers(raw, whole_number)
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError("must be one side (512) or width,height (512,768) in pixels")
    return (sides[0], sides[-1])


def ascending_pair(raw: Any) -> tuple[float, float]:
    """``"1.0,3.0"`` or ``[1.0, 3.0]``: two positive numbers, the first not above the second."""
    try:
        pair = _numbers(raw, number)
    except ValueError:
        pair = []
    if len(pair) != 2 or pair[0] > pair[1] or pair[0] <= 0:
        raise ValueError("must be two positive numbers, the lower one first (1.0,3.0)")
    return (pair[0], pair[1])


def steps_or_share(raw: Any) -> int | float:
    """A number of steps (``100``), or a share of all steps (``0.1``, ``"10%"``), which is a float below 1."""
    problem = ValueError("must be a number of steps (100) or a share of all steps (0.1 or 10%)")
    try:
        if isinstance(raw, str) and raw.strip().endswith("%"):
            share = number(raw.strip()[:-1]) / 100
            if not 0 <= share < 1:
                raise problem
            return share if share > 0 else 0
        value = number(raw)
    except ValueError:
        raise problem from None
    if value < 0 or (value >= 1 and not value.is_integer()):
        raise problem
    return value if 0 < value < 1 else int(value)


def rate_list(count: int) -> Callable[[Any], tuple[float, ...]]:
    """The check for exactly ``count`` learning rates: ``"1e-4,0,2e-5 ..."`` or a list of numbers."""

    def check(raw: Any) -> tuple[float, ...]:
        try:
            rates = _numbers(raw, number)
        except ValueError:
            rates = []
        if len(rates) != count or min(rates) < 0:
            found = f", not {len(rates)}" if rates and len(rates) != count else ""
            raise ValueError(f"must be {count} numbers of 0 or more, separated by commas{found}")
        return tuple(rates)

    return check


def not_empty(raw: Any) -> str:
    """Text of at least one character."""
    if not text(raw):
        raise ValueError("must not be empty")
    return raw


def file_suffix(raw: Any) -> str:
    """The end of a file's name, with its dot: ``.txt``, also of ``txt``."""
    suffix = text(raw).lstrip(".")
    if not suffix:
        raise ValueError("must be the end of a file's name (.txt)")
    return f".{suffix}"


def pixel_sizes(raw: Any) -> tuple[tuple[int, int], ...]:
    """``"512x512,256x384"`` as (width, height) pairs in pixels; pairs of numbers are taken as they are."""
    items = raw.split(",") if isinstance(raw, str) else list(raw)
    sizes: list[tuple[int, int]] = []
    for item in items:
        sides = item.strip().lower().split("x") if isinstance(item, str) else list(item)
        try:
            width, height = (whole_number(side) for side in sides)
        except ValueError:
            width = height = 0
        if min(width, height) < 1:
            raise ValueError("must be sizes in pixels (512x512,256x256)")
        sizes.append((width, height))
    return tuple(sizes)


def whole_size(raw: Any) -> tuple[int, int]:
    """``"512,768"`` as (width, height) in pixels."""
    size = _numbers(raw, whole_number)
    if len(size) != 2 or min(size) < 1:
        raise ValueError("must be width,height in pixels (512,768)")
    return (size[0], size[1])


def ratio_pair(raw: Any) -> tuple[float, float]:
    """``"4.0,5.0"``: two positive factors."""
    pair = _numbers(raw, number)
    if len(pair) != 2 or min(pair) <= 0:
        raise ValueError("must be two positive numbers (4.0,5.0)")
    return (pair[0], pair[1])
