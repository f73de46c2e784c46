"""The Japanese documents mirror the English ones: headings, commands, tables, names, pictures and links."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.guides import FENCE, inline_commands, relative
from tests.house.source_map import ROOT
from tests.house.test_docs import LINK
from tools import make_option_docs

# Pages for those who change the code or measure it; they have no Japanese counterpart.
ENGLISH_ONLY = {"architecture.md", "performance.md"}
GUIDES = {path.name for path in (ROOT / "docs").glob("*.md")} - ENGLISH_ONLY
JAPANESE_OF = {
    ROOT / "README.md": ROOT / "README-ja.md",
    **{ROOT / "docs" / name: ROOT / "docs" / "ja" / name for name in sorted(GUIDES)},
}
ENGLISH_OF = {japanese: english for english, japanese in JAPANESE_OF.items()}
PAIRS = [pytest.param(pair, id=relative(pair[0])) for pair in JAPANESE_OF.items() if pair[1].is_file()]
COMMENT = re.compile(r"(^|\s+)#.*$", re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")

Pair = tuple[Path, Path]


def prose(document: Path) -> str:
    """The text without its code blocks."""
    return FENCE.sub("", document.read_text("utf-8"))


def commands(document: Path) -> list[tuple[str, str]]:
    """Language and text of each code block, without the comments."""
    return [(language, COMMENT.sub("", body)) for language, body in FENCE.findall(document.read_text("utf-8"))]


def headings(document: Path) -> list[tuple[str, str]]:
    """Marks (## for level 2) and title of each heading."""
    return re.findall(r"^(#+) (.*)$", prose(document), re.MULTILINE)


def anchors(document: Path) -> list[str]:
    """The name by which links call each heading: letters, digits, _ and -; equal ones are numbered."""
    names = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for _, title in headings(document)]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}-{count}" if count else name for name, count in zip(names, earlier, strict=True)]


def rows(document: Path) -> list[int]:
    """The number of cell borders in each row of the tables."""
    lines = [line for line in prose(document).splitlines() if line.startswith("|")]
    return [len(re.findall(r"(?<!\\)\|", line)) for line in lines]


def targets(document: Path) -> list[tuple[Path | str, str]]:
    """File (or address) and anchor of each link and picture."""
    found = LINK.findall(prose(document))
    return [(t if "://" in t else (document.parent / t).resolve() if t else document, a[1:]) for t, a in found]


def links(document: Path) -> Counter[str]:
    """Where the links lead, in words that are the same for both languages: the English file, the heading's number."""
    found: list[str] = []
    for target, anchor in targets(document):
        if isinstance(target, str):
            found.append(target)
            continue
        names = anchors(target) if anchor and target.is_file() else []
        place = f" heading {names.index(anchor) + 1}" if anchor in names else f" no heading {anchor}" if anchor else ""
        found.append(relative(ENGLISH_OF.get(target, target)) + place)
    return Counter(found)


def test_every_guide_is_there_in_japanese():
    assert (ROOT / "README-ja.md").is_file()
    assert {path.name for path in (ROOT / "docs" / "ja").glob("*.md")} == GUIDES


@pytest.mark.parametrize("pair", PAIRS)
def test_headings_have_the_same_levels(pair: Pair):
    english, japanese = ([marks for marks, _ in headings(document)] for document in pair)
    assert japanese == english


@pytest.mark.parametrize("pair", PAIRS)
def test_commands_are_identical(pair: Pair):
    english, japanese = (commands(document) for document in pair)
    assert japanese == english


@pytest.mark.parametrize("pair", PAIRS)
def test_commands_within_sentences_are_identical(pair: Pair):
    english, japanese = (set(inline_commands(document)) for document in pair)
    assert japanese == english


@pytest.mark.parametrize("pair", PAIRS)
def test_tables_have_the_same_rows(pair: Pair):
    english, japanese = (rows(document) for document in pair)
    assert japanese == english


@pytest.mark.parametrize("pair", PAIRS)
def test_options_files_and_values_are_named_in_both(pair: Pair):
    """What stands in `backticks` and is a name, not words: it changes in both languages or in none."""
    english, japanese = ({span for span in SPAN.findall(prose(document)) if " " not in span} for document in pair)
    assert not english - japanese, "the Japanese page lacks these"
    assert not {name for name in japanese if name not in pair[0].read_text("utf-8")}, "the English page lacks these"


@pytest.mark.parametrize("pair", PAIRS)
def test_links_lead_to_the_same_places(pair: Pair):
    english, japanese = pair
    assert links(japanese) == links(english)
    away = [relative(target) for target, _ in targets(japanese) if target in JAPANESE_OF and target != english]
    assert not away, "has a Japanese page"


def test_a_help_text_without_japanese_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    table = make_option_docs.JAPANESE_TEXTS.read_text("utf-8")
    changed = tmp_path / "help.toml"
    changed.write_text(table.replace('"folder of the masks for', '"folder with the masks for'), "utf-8")
    monkeypatch.setattr(make_option_docs, "JAPANESE_TEXTS", changed)
    assert make_option_docs.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "no Japanese for: folder of the masks for" in said
    assert "no option says: folder with the masks for" in said
