"""The language of weights in prompts and captions: ``(text)``, ``[text]``, ``(text:1.3)``, escapes, and the word BREAK.

Nothing in a text is an error: what is no well-formed weight is text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

STRONGER = 1.1  # factor of a round bracket without a number; a square bracket divides by it
_LEXER = re.compile(
    r"\\(?P<escaped>[()\[\]\\])|(?P<lone>\\)|(?P<open>[(\[])|:(?P<number>[+-]?[\d.]+)\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+)|(?P<colon>:)"
)
_BREAK_WORD = re.compile(r"\bBREAK\b")


class Piece(NamedTuple):
    """A stretch of text of one weight."""

    text: str
    weight: float


BREAK = Piece("BREAK", 1.0)  # compared by identity: the mark, not a text


def parse_emphasis(text: str, breaks: bool = False) -> tuple[Piece, ...]:
    """Cut a text in pieces of equal weight; an empty text is one empty piece of weight 1.

    Brackets multiply the weight of what they enclose; an unclosed one holds up to the end; unmatched closers are text.
    A number that is none (``(a:1.2.3)``) is text as well. With ``breaks`` the word BREAK, standing alone, becomes the
    piece ``BREAK``.
    """
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        pieces[start:] = [
            piece if piece is BREAK else Piece(piece.text, piece.weight * factor) for piece in pieces[start:]
        ]

    for token in _LEXER.finditer(text):
        kind, found = token.lastgroup, token.group()
        if kind == "escaped":
            pieces.append(Piece(found[1], 1.0))
        elif kind == "open":
            opened[found].append(len(pieces))
        elif kind == "number" and opened["("]:
            factor = _number(token.group("number"))
            if factor is None:
                pieces.append(Piece(found[:-1], 1.0))
            scale(opened["("].pop(), STRONGER if factor is None else factor)
        elif kind == "close" and opened["(" if found == ")" else "["]:
            scale(opened["(" if found == ")" else "["].pop(), STRONGER if found == ")" else 1 / STRONGER)
        elif kind == "text" and breaks:
            pieces.extend(_split_at_breaks(found))
        elif kind != "lone":
            pieces.append(Piece(found, 1.0))
    for start in opened["("]:
        scale(start, STRONGER)
    for start in opened["["]:
        scale(start, 1 / STRONGER)
    return _merged(pieces)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _split_at_breaks(text: str) -> list[Piece]:
    parts = _BREAK_WORD.split(text)
    pieces = [Piece(parts[0], 1.0)]
    for part in parts[1:]:
        pieces += [BREAK, Piece(part, 1.0)]
    return [piece for piece in pieces if piece.text]


def _merged(pieces: list[Piece]) -> tuple[Piece, ...]:
    merged: list[Piece] = []
    for piece in pieces:
        if merged and piece is not BREAK and merged[-1] is not BREAK and merged[-1].weight == piece.weight:
            merged[-1] = Piece(merged[-1].text + piece.text, piece.weight)
        else:
            merged.append(piece)
    return tuple(merged) or (Piece("", 1.0),)
