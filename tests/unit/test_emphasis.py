"""The language of weights: tables of the specification, and that no text is an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.text.emphasis import BREAK, parse_emphasis


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a (b:1.2) c", [("a ", 1.0), ("b", 1.2), (" c", 1.0)]),
        ("((a))", [("a", 1.21)]),
        ("(a [b])", [("a ", 1.1), ("b", 1.0)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("[[a]]", [("a", 0.826446)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(a:+2)", [("a", 2.0)]),
        ("a:1.2)", [("a:1.2)", 1.0)]),
        ("(a:1.2", [("a:1.2", 1.1)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("(a:1.5:2)", [("a:1.5", 2.0)]),
        ("(a: 1.2)", [("a: 1.2", 1.1)]),
        (r"a\(b\)", [("a(b)", 1.0)]),
        (r"\(x\) (y)", [("(x) ", 1.0), ("y", 1.1)]),
        (r"a\b \\", [("ab \\", 1.0)]),
        ("()", [("", 1.0)]),
        ("", [("", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:.)", [("a:.", 1.1)]),
        ("a, BREAK b", [("a, BREAK b", 1.0)]),
    ],
)
def test_pieces(text: str, pieces: list[tuple[str, float]]) -> None:
    found = parse_emphasis(text)
    assert [piece.text for piece in found] == [piece[0] for piece in pieces]
    assert [piece.weight for piece in found] == pytest.approx([piece[1] for piece in pieces], abs=1e-6)


def test_break_keeps_its_neighbours_weights_and_has_none_itself() -> None:
    found = parse_emphasis("(a, BREAK b:1.3)", breaks=True)
    assert found == (("a, ", 1.3), BREAK, (" b", 1.3))
    assert found[1] is BREAK


def test_break_is_a_word_of_its_own() -> None:
    assert parse_emphasis("a BREAKFAST, break", breaks=True) == (("a BREAKFAST, break", 1.0),)
    assert [piece is BREAK for piece in parse_emphasis("(a BREAK)", breaks=True)] == [False, True]


@given(st.text(alphabet="ab :.()[]\\-+12"), st.booleans())
def test_no_text_is_an_error_and_no_letter_is_lost(text: str, breaks: bool) -> None:
    found = parse_emphasis(text, breaks)
    assert "".join(piece.text for piece in found).count("a") == text.count("a")


@given(st.text(alphabet="ab ,.:é日\n"))
def test_text_without_brackets_is_itself(text: str) -> None:
    assert parse_emphasis(text) == ((text, 1.0),)
