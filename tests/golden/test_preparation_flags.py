"""The command lines of the preparation tools are those of the reference: words, options, types, defaults, choices."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.options.parser import read_command_line
from library.options.preparation_scripts import PREPARATION_SCRIPTS

DATA = Path(__file__).parent / "data" / "preparation_flags.tsv"
ROWS = list(csv.DictReader(DATA.open(encoding="utf-8", newline=""), delimiter="\t"))
SCRIPTS = {Path(script.name).stem: script for script in PREPARATION_SCRIPTS}
CASES = [pytest.param(row, id=f"{row['script']} {row['option']}") for row in ROWS]
KINDS = {"flag": "bool"}

# Where ours is wider or better than the reference, on purpose.
PARSED_TEXTS = {"max_resolution", "crop_size", "crop_ratio"}  # texts there, numbers here
OTHER_DEFAULTS = {"caption_weights": "'Salesforce/blip-image-captioning-large'"}  # no file of pickles from an address
OTHER_KINDS = {"thres1": "float", "thres2": "float"}


def test_every_tool_of_the_reference_is_here():
    assert {row["script"] for row in ROWS} == set(SCRIPTS)


@pytest.mark.parametrize("row", CASES)
def test_type_default_and_choices(row: dict[str, str]):
    name, script = row["option"], SCRIPTS[row["script"]]
    (spec,) = [spec for spec in script.specs().values() if name in spec.names]
    assert spec.told.positional == (row["presence"] == "positional")
    if name not in PARSED_TEXTS:
        assert spec.kind.__name__ == OTHER_KINDS.get(name, KINDS.get(row["type"], row["type"]))
    if not spec.told.positional and name == spec.name:
        assert repr(script.default_of(spec)) == OTHER_DEFAULTS.get(name, row["default"])
    choices = set() if row["choices"] == "-" else set(row["choices"].split("|"))
    assert {str(choice) for choice in spec.choices} == choices


@pytest.mark.parametrize("script", SCRIPTS)
def test_words_without_dashes_come_in_the_references_order_and_anywhere(script: str):
    wanted = [row["option"] for row in ROWS if row["script"] == script and row["presence"] == "positional"]
    declared = [spec.name for spec in SCRIPTS[script].specs().values() if spec.told.positional]
    flags = [f"--{row['option']}" for row in ROWS if row["script"] == script and row["type"] == "flag"]
    order = declared[: len(wanted)]
    assert set(order) == set(wanted)
    words = [f"word {place}" for place in range(len(order))]
    lines = [[*words, *flags], [*flags, *words], [*words[:1], *flags, *words[1:]]]
    for line in lines:
        known, unknown, problems = read_command_line(SCRIPTS[script], line)
        assert (unknown, problems) == ([], [])
        assert [known[name].value for name in order] == words
    _, _, problems = read_command_line(SCRIPTS[script], [f"word {place}" for place in range(len(declared) + 1)])
    assert len(problems) == 1


def test_a_word_may_also_be_given_as_an_option():
    known, _, problems = read_command_line(SCRIPTS["prepare_buckets_latents"], ["a", "--in_json", "b", "c", "d"])
    names = ("train_data_dir", "in_json", "out_json", "model_name_or_path")
    assert [known[name].value for name in names] == ["a", "b", "c", "d"]
    assert problems == []
