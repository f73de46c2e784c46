"""Who comes from sd-scripts: every option of its scripts is taken here, or the guide for those users tells of it.

What is compared: names, defaults and choices in the tables beside this file, with the declarations of the scripts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.data.spec_keys import FOREIGN_KEYS
from library.options.base import OptionSpec
from library.options.foreign import HARMLESS, NEUTRAL
from library.options.scripts import SCRIPTS
from library.options.settings import ScriptOptions

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"
GUIDE = (ROOT / "docs" / "migrating.md").read_text("utf-8")
PROGRAMS = {script.name: script for script in SCRIPTS} | {Path(script.name).stem: script for script in SCRIPTS}
PROGRAMS["gen_img_diffusers.py"] = PROGRAMS["gen_img.py"]
PARSED_TEXTS = {"max_resolution", "crop_size", "crop_ratio"}  # texts there, the same numbers here

Row = dict[str, str]


def tables() -> dict[str, list[Row]]:
    """The options of sd-scripts by script."""
    found: dict[str, list[Row]] = {}
    for path in sorted(DATA.glob("*_flags.tsv")):
        for row in csv.DictReader(path.open(encoding="utf-8", newline=""), delimiter="\t"):
            found.setdefault(row.get("script") or path.name.replace("_flags.tsv", ".py"), []).append(row)
    return found


TABLES = tables()
PRESENT = [name for name, rows in TABLES.items() if rows[0]["option"] != "-"]


def names_in(title: str) -> set[str]:
    """All that stands between backquotes in a section of the guide."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found, f"the guide has no section {title}"
    return set(re.findall(r"`(?:--)?([^`]+)`", found[1]))


def compared(name: str) -> Iterator[tuple[OptionSpec, ScriptOptions, Row]]:
    """The options of a script that are here too, under the names that they have in ours."""
    script = PROGRAMS[name]
    specs = {alias: spec for spec in script.specs().values() for alias in spec.names}
    for row in TABLES[name]:
        if row["option"] in specs:
            yield specs[row["option"]], script, row


def other_defaults(name: str) -> set[str]:
    return {
        spec.name
        for spec, script, row in compared(name)
        if spec.name == row["option"] and spec.name not in PARSED_TEXTS and not spec.told.positional
        if repr(script.default_of(spec)) != row["default"]
    }


@pytest.mark.parametrize("name", sorted(TABLES.keys() - set(PRESENT)))
def test_scripts_that_are_not_here_are_told(name: str) -> None:
    assert not (ROOT / name).exists()
    assert name in names_in("Scripts with another name")


@pytest.mark.parametrize("name", PRESENT)
def test_every_option_is_taken_or_told(name: str) -> None:
    taken = {row["option"] for _, _, row in compared(name)}
    missing = {row["option"] for row in TABLES[name]} - taken
    assert missing <= names_in("What is refused")


@pytest.mark.parametrize("name", PRESENT)
def test_every_choice_is_taken(name: str) -> None:
    for spec, _, row in compared(name):
        theirs = set() if row["choices"] == "-" else set(row["choices"].split("|")) - {"None"}
        assert theirs <= {str(choice) for choice in spec.choices}, spec.name
        assert not spec.choices or theirs, f"{spec.name} takes any value there"


def test_other_defaults_are_told_and_no_others() -> None:
    found = set[str]().union(*(other_defaults(name) for name in PRESENT))
    told = names_in("Other defaults")
    every_option = {name for script in SCRIPTS for spec in script.specs().values() for name in spec.names}
    no_default_there = {"cond_emb_dim", "network_dim"}  # the declarations have none either: the training chooses
    assert found <= told
    assert told & every_option <= found | no_default_there


def test_options_without_effect_are_told() -> None:
    specs = [spec for script in SCRIPTS for spec in script.specs().values()]
    idle = {spec.name for spec in specs if spec.told.help.startswith("accepted")} - {"third_word"}
    assert idle <= names_in("Accepted, without effect")


def test_names_of_newer_versions_are_told() -> None:
    every_option = {name for script in SCRIPTS for spec in script.specs().values() for name in spec.names}
    assert names_in("Options of newer versions") == ((HARMLESS | NEUTRAL.keys()) - every_option) | FOREIGN_KEYS
