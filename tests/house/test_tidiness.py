"""Sizes, names and traces that must not be in the source tree."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

from tests.house.source_map import ROOT, files_of_tests, source_files

MOST_LINES = 450
MOST_ENTRY_LINES = 60
MOST_FUNCTION_LINES = 80
MOST_FILE_BYTES = 25_000_000
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".lock", ".cfg", ""}
# Joined here so that this file does not hold what it looks for.
MACHINE_TRACES = [
    re.compile(a + b) for a, b in (("/wo", r"rk/"), ("/ro", r"ot/"), ("/ho", r"me/\w"), (r"C:\\Us", "ers"))
]
ROOT_SUFFIXES = {".py", ".md", ".txt", ".lock", ".toml"}
ROOT_FILES = {"LICENSE", ".gitignore", ".pre-commit-config.yaml"}
EMPTY_NAMES = re.compile(r"utils?(\b|_)|_utils?\b|helpers?\b|\bmisc\b|\bcommon\b")
LEFT_OVERS = re.compile(r"#\s*(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def tracked_files() -> list[Path]:
    """Files that belong to the project: what git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [*source_files(), *files_of_tests()]


def text_of(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")


def test_files_stay_small():
    long = {
        str(path.relative_to(ROOT)): count
        for path in [*source_files(), *files_of_tests()]
        if (count := len(text_of(path).splitlines())) > MOST_LINES
    }
    assert not long


def test_entry_scripts_are_rows_not_programs():
    long = {
        path.name: count
        for path in ROOT.glob("*.py")
        if path.name != "quickstart.py" and (count := len(text_of(path).splitlines())) > MOST_ENTRY_LINES
    }
    assert not long


def test_functions_stay_small():
    long: list[str] = []
    for path in source_files():
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MOST_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count} lines")
    assert not long, "\n".join(long)


def test_modules_and_public_names_are_explained():
    bare: list[str] = []
    for path in source_files():
        tree = ast.parse(text_of(path))
        if tree.body and ast.get_docstring(tree) is None:
            bare.append(f"{path.relative_to(ROOT)}: no module docstring")
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and node.name != "main" and ast.get_docstring(node) is None:
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: no docstring")
    assert not bare, "\n".join(bare)


def test_no_names_that_say_nothing():
    wrong = [
        str(path.relative_to(ROOT))
        for path in [*source_files(), *files_of_tests()]
        if EMPTY_NAMES.search(path.stem) or EMPTY_NAMES.search(path.parent.name)
    ]
    assert not wrong


def test_no_traces_of_a_machine_and_no_left_overs():
    wrong: list[str] = []
    for path in tracked_files():
        if path.suffix not in TEXT_SUFFIXES or path.stat().st_size > 2_000_000:
            continue
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if any(trace.search(line) for trace in MACHINE_TRACES) or LEFT_OVERS.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_no_large_files():
    large = [str(path.relative_to(ROOT)) for path in tracked_files() if path.stat().st_size > MOST_FILE_BYTES]
    assert not large


def test_root_holds_scripts_and_documents_only():
    """What a script writes into the folder that it was started from does not belong to the project."""
    at_root = [path for path in tracked_files() if path.parent == ROOT]
    stray = [path.name for path in at_root if path.suffix not in ROOT_SUFFIXES and path.name not in ROOT_FILES]
    assert at_root
    assert not stray


def test_no_global_statements():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Global)
    ]
    assert not wrong, "process-global state: " + ", ".join(wrong)
