"""Where something stands in a TOML or JSON file of the user: the way to it in words, and its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Where = tuple[str | int, ...]
"""The way to a value of a document: keys and list positions, for example ``("datasets", 0, "resolution")``."""


def describe_place(where: Where) -> str:
    """``datasets[0].subsets[1].num_repeats``."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def line_of(text: str, is_json: bool, document: Any, where: Where) -> int | None:
    """The line (from 1) of a place, or of the nearest table around it; None if neither is found in the text.

    Places come in the text in the order of the document, so the n-th one of a name there is the n-th in the text.
    """
    if not is_json:
        text = _TOML_TEXT.sub(_blanked, text)
    paths = list(_walk(document, ()))
    while where:
        pattern = _json_pattern(where) if is_json else _toml_pattern(where)
        earlier = _earlier_places(paths, where)
        if pattern is not None and earlier is not None:
            starts = [match.start("key") for match in re.finditer(pattern, text)]
            if earlier < len(starts):
                return text.count("\n", 0, starts[earlier]) + 1
        where = where[:-1]
    return None


_TOML_TEXT = re.compile(
    r"""
    \#.*
    | \"{3} [\s\S]*? (?<!\\) \"{3,5}
    | '{3} [\s\S]*? '{3,5}
    | "(?: \\. | [^"\\\n] )*"
    | '[^'\n]*'
    """,
    re.VERBOSE,
)
_AFTER_KEY = re.compile(r"[ \t]*[=.\]]")
_TABLE_NAMES = r"(?:[\w\"'-]+[ \t]*\.[ \t]*)*"  # of a dotted key


def _blanked(found: re.Match[str]) -> str:
    """Nothing but the line breaks of a comment or a text; a quoted key stays."""
    if found[0][0] != "#" and _AFTER_KEY.match(found.string, found.end()):
        return found[0]
    return "\n" * found[0].count("\n")


def _json_pattern(where: Where) -> str | None:
    return rf'(?P<key>"{re.escape(where[-1])}")\s*:' if isinstance(where[-1], str) else None


def _toml_pattern(where: Where) -> str:
    """A key with its value, or the header of a table or of one entry of a list of tables."""
    header = r"[ \t]*\.[ \t]*".join(re.escape(part) for part in where if isinstance(part, str))
    if isinstance(where[-1], int):
        return rf"(?m)^[ \t]*(?P<key>\[\[[ \t]*{header}[ \t]*\]\])"
    key = rf"[\"']?{re.escape(where[-1])}[\"']?[ \t]*="
    table = rf"\[[ \t]*{header}[ \t]*\][ \t]*$"
    return rf"(?m)(?:^[ \t]*|[{{,][ \t]*)(?P<key>{_TABLE_NAMES}{key}|{table})"


def _earlier_places(paths: list[Where], where: Where) -> int | None:
    """How many places that look alike come before this one; None if the place is not in the document."""
    count = 0
    for path in paths:
        if path == where:
            return count
        if isinstance(where[-1], str):
            count += path[-1] == where[-1]
        else:
            count += isinstance(path[-1], int) and _names(path) == _names(where)
    return None


def _names(path: Where) -> list[str]:
    return [part for part in path if isinstance(part, str)]


def _walk(value: Any, path: Where) -> Iterator[Where]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from _walk(item, (*path, name))
