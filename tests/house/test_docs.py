"""The documents tell the truth: files and options that they name exist, their configurations are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.guides import DOCUMENTS, commands_of, relative
from tests.house.source_map import ROOT

# Also those in Japanese, whose commands are the same.
PAGES = [*DOCUMENTS, ROOT / "README-ja.md", *sorted((ROOT / "docs" / "ja").glob("*.md"))]
CONFIGS = sorted(path for path in (ROOT / "examples").glob("*.toml") if "dataset" not in path.name)
# Options of programs of others that the documents mention.
FOREIGN = {"--multi_gpu", "--num_processes", "--nproc_per_node", "--cpu", "--index-url", "--logdir", "--no-deps"}
FOREIGN |= {"--name", "--no-name"}  # stand for any switch
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*(?!\w)")
# The letters behind a prompt in a prompt file.
PROMPT_LETTERS = re.compile(r"--(n|w|h|d|l|s|ss|cn|am)\b")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


def own_options() -> set[str]:
    """Every option of every script, with its opposite if it is a switch, and the options of quickstart.py and tools."""
    from library.options.scripts import SCRIPTS

    found = {"--help"}
    for script in SCRIPTS:
        for spec in script.specs().values():
            found |= {f"--{name}" for name in spec.names}
            found |= {f"--no-{name}" for name in spec.names} if spec.is_flag else set()
    declared = re.compile(r"add_argument\(\s*\"(--\w+)\"")
    for path in (ROOT / "quickstart.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        found |= set(declared.findall(path.read_text("utf-8")))
    return found


@pytest.mark.parametrize("document", PAGES, ids=relative)
def test_options_named_in_documents_exist(document: Path):
    text = PROMPT_LETTERS.sub("", document.read_text("utf-8"))
    named = {flag for flag in FLAG.findall(text) if not flag.endswith(("_", "-"))}
    unknown = named - own_options() - FOREIGN
    assert not unknown, f"{relative(document)} names options that do not exist: {sorted(unknown)}"


@pytest.mark.parametrize("document", PAGES, ids=relative)
def test_commands_of_documents_name_files_that_exist(document: Path):
    missing: list[str] = []
    for command in commands_of(document):
        for word in shlex.split(command, comments=True):
            if word.endswith(".py") or word.startswith("examples/"):
                missing += [f"{command}: {word}"] if not (ROOT / word).exists() else []
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("document", PAGES, ids=relative)
def test_training_commands_of_documents_are_accepted(document: Path, monkeypatch: pytest.MonkeyPatch):
    """Together with the example that they name; files of the reader's own are not there to be read."""
    from library.options.script import parse
    from library.options.scripts import SCRIPTS

    monkeypatch.chdir(ROOT)
    rows = {script.name: script for script in SCRIPTS}
    for command in commands_of(document):
        words = shlex.split(command, comments=True)
        for script in rows.keys() & set(words):
            options = words[words.index(script) + 1 :]
            if any(word.startswith("examples/") for word in options):
                parse(rows[script], options)


@pytest.mark.parametrize("document", PAGES, ids=relative)
def test_links_lead_somewhere(document: Path):
    broken: list[str] = []
    for target, anchor in LINK.findall(document.read_text("utf-8")):
        if "://" in target:
            continue
        path = (document.parent / target).resolve() if target else document
        if not path.exists():
            broken.append(target)
        elif anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
            broken += [] if anchor[1:] in anchors else [target + anchor]
    assert not broken, f"{relative(document)}: {broken}"


@pytest.mark.parametrize("config", CONFIGS, ids=relative)
def test_example_configurations_are_accepted(config: Path, monkeypatch: pytest.MonkeyPatch):
    from library.options.script import parse
    from library.options.scripts import SCRIPTS

    monkeypatch.chdir(ROOT)
    named = re.search(r"^# .*?(\w+\.py) --config_file", config.read_text("utf-8"), re.MULTILINE)
    assert named, "its first lines must say which script it is for"
    (script,) = [script for script in SCRIPTS if script.name == named[1]]
    settings = parse(script, ["--config_file", str(config)])
    assert settings.value_of("network_module") in ("networks.lora", None)
    unexpected = [line for line in settings.warnings if "--config_file" not in line and "switches" not in line]
    assert not unexpected


def test_quickstart_configuration_names_files_that_exist(monkeypatch: pytest.MonkeyPatch):
    from library.options.script import parse
    from library.options.scripts import TRAIN_NETWORK

    monkeypatch.chdir(ROOT)
    settings = parse(TRAIN_NETWORK, ["--config_file", "examples/quickstart.toml"])
    for name in ("pretrained_model_name_or_path", "train_data_dir", "sample_prompts"):
        assert Path(str(settings.value_of(name))).exists(), name


def test_option_tables_are_fresh(capsys: pytest.CaptureFixture[str]):
    from tools.make_option_docs import main

    assert main(["--check"]) == 0, capsys.readouterr().out


def test_readme_names_the_two_commands_that_ci_uses():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "python quickstart.py\n" in readme
    assert "python quickstart.py --test" in readme
    assert "quickstart.py --test" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_every_option_page_and_guide_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    unlinked = [path.name for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in readme]
    assert not unlinked
