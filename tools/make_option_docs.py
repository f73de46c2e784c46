"""Write docs/options.md and docs/ja/options.md, the tables of all options, from their declarations.

``python tools/make_option_docs.py`` writes the pages; ``--check`` only says, by its exit status, if they are fresh.
The Japanese texts stand in docs/ja/help.toml, keyed by the English ones. An English text that was changed has none: it
stands in the Japanese page as it is, and is named as missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.checkpoint.io import atomic_write_text  # noqa: E402
from library.options import scripts  # noqa: E402
from library.options.base import OptionGroup, OptionSpec, specs_of  # noqa: E402
from library.options.toml_file import parse_toml  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
JAPANESE_PAGE = ROOT / "docs" / "ja" / "options.md"
JAPANESE_TEXTS = ROOT / "docs" / "ja" / "help.toml"
INTRODUCTION = (
    """\
This page is generated from the declarations in `library/options/` by `tools/make_option_docs.py`; do not edit it.""",
    """\
An option stands on the command line (`--network_dim 16`) or, without the dashes, in the TOML file that `--config_file`
names (`network_dim = 16`). The command line wins over the file, and the file over the default. Tables in the file only
group keys; their names mean nothing. A switch is `true` or `false` in the file; on the command line `--name` switches
it on and `--no-name` off. `--output_config` writes the options of a command line to such a file.""",
    """\
The column *levels* says where else an option may stand: in the `[general]` part, a `[[datasets]]` or a
`[[datasets.subsets]]` entry of a data set file (`--dataset_config`), there under the key in brackets if it differs.""",
)
KIND_NAMES = {"int": "whole number", "float": "number", "str": "text", "Path": "path", "bool": "switch"}
COLUMNS = ("option", "type", "default", "allowed", "levels", "meaning")


class Words:
    """The texts of a page in one language, by the English ones, whose line breaks do not count.

    ``asked`` holds the English texts that the page needed.
    """

    def __init__(self, translations: Mapping[str, str]) -> None:
        self.translations = translations
        self.asked: dict[str, None] = {}

    def __call__(self, english: str) -> str:
        """The text in this language; the English one if there is no other."""
        key = " ".join(english.split())
        self.asked[key] = None
        return self.translations.get(key, english)

    def missing(self) -> list[str]:
        """English texts that the page needed and that have no translation."""
        return [text for text in self.asked if text not in self.translations]

    def unused(self) -> list[str]:
        """English texts that have a translation, and that the page did not need."""
        return [text for text in self.translations if text not in self.asked]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(spec: OptionSpec, words: Words) -> str:
    name = KIND_NAMES[spec.kind.__name__]
    if spec.told.positional:
        return words(f"{name}, with or without `--NAME`").replace("NAME", spec.name)
    return words(f"list of {name}s" if spec.is_list else name)


def _default(value: Any) -> str:
    return "" if value in (None, "") else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(spec: OptionSpec, words: Words) -> str:
    return words(spec.allowed) if spec.allowed and not spec.choices else spec.allowed


def _levels(spec: OptionSpec) -> str:
    levels = [level for level in ("general", "dataset", "subset") if level in spec.told.scope]
    other_key = f" (`{spec.dataset_key}`)" if levels and spec.dataset_key != spec.name else ""
    return ", ".join(levels) + other_key


def _row(spec: OptionSpec, words: Words) -> str:
    names = ", ".join(f"`{name}`" for name in spec.names)
    type_and_default = (_type(spec, words), _default(spec.default))
    cells = (names, *type_and_default, _allowed(spec, words), _levels(spec), words(spec.told.help))
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _users(group: type[OptionGroup], words: Words) -> str:
    users = [script.name for script in scripts.SCRIPTS if group in script.groups]
    if len(users) == len(scripts.SCRIPTS):
        return ""
    return words("Only in NAMES.").replace("NAMES", ", ".join(users)) + "\n\n"


def option_docs(words: Words) -> str:
    """The text of the page in the language of ``words``."""
    groups = dict.fromkeys(group for script in scripts.SCRIPTS for group in script.groups)
    columns = " | ".join(words(column) for column in COLUMNS)
    parts = [f"# {words('Options')}\n", *(f"{words(paragraph)}\n" for paragraph in INTRODUCTION)]
    for group in groups:
        rows = "\n".join(_row(spec, words) for spec in specs_of(group))
        heading = f"## {words(group.title)}\n\n{_users(group, words)}"
        parts.append(f"{heading}| {columns} |\n|{'---|' * len(COLUMNS)}\n{rows}\n")
    return "\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Write the pages, or check them. The exit status is 1 if the check fails."""
    parser = argparse.ArgumentParser(description="Write the tables of all options, in English and Japanese.")
    parser.add_argument("--check", action="store_true", help="write nothing; the exit status is 1 if they are stale")
    check_only: bool = parser.parse_args(argv).check
    japanese = Words(parse_toml(JAPANESE_TEXTS.read_text(encoding="utf-8")))
    pages = {PAGE: option_docs(Words({})), JAPANESE_PAGE: option_docs(japanese)}
    if not check_only:
        for path, text in pages.items():
            atomic_write_text(path, text)
            print(f"wrote {path.relative_to(ROOT)}")
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    problems = [f"{path.relative_to(ROOT)} is stale: run python tools/make_option_docs.py" for path in stale]
    problems += [f"docs/ja/help.toml has no Japanese for: {text}" for text in japanese.missing()]
    problems += [f"docs/ja/help.toml has Japanese for what no option says: {text}" for text in japanese.unused()]
    print("\n".join(problems) or "the option tables are up to date")
    return 1 if problems and check_only else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
