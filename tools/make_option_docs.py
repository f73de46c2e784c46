"""Write docs/options.md, the table of all options, from their declarations.

``python tools/make_option_docs.py`` writes the file; ``--check`` only says, by its exit status, if it is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.checkpoint.io import atomic_write_text  # noqa: E402
from library.options import scripts  # noqa: E402
from library.options.base import OptionGroup, OptionSpec, specs_of  # noqa: E402

TARGET = ROOT / "docs" / "options.md"
HEADER = """\
# Options

This page is generated from the declarations in `library/options/` by `tools/make_option_docs.py`; do not edit it.

An option stands on the command line (`--network_dim 16`) or, without the dashes, in the TOML file that `--config_file`
names (`network_dim = 16`). The command line wins over the file, and the file over the default. Tables in the file only
group keys; their names mean nothing. A switch is `true` or `false` in the file; on the command line `--name` switches
it on and `--no-name` off. `--output_config` writes the options of a command line to such a file.

The column *levels* says where else an option may stand: in the `[general]` part, a `[[datasets]]` or a
`[[datasets.subsets]]` entry of a data set file (`--dataset_config`), there under the key in brackets if it differs.
"""
KIND_NAMES = {"int": "whole number", "float": "number", "str": "text", "Path": "path", "bool": "switch"}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(spec: OptionSpec) -> str:
    name = KIND_NAMES[spec.kind.__name__]
    if spec.told.positional:
        return f"{name}, with or without `--{spec.name}`"
    return f"list of {name}s" if spec.is_list else name


def _default(value: Any) -> str:
    return "" if value in (None, "") else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _levels(spec: OptionSpec) -> str:
    levels = [level for level in ("general", "dataset", "subset") if level in spec.told.scope]
    other_key = f" (`{spec.dataset_key}`)" if levels and spec.dataset_key != spec.name else ""
    return ", ".join(levels) + other_key


def _row(spec: OptionSpec) -> str:
    names = ", ".join(f"`{name}`" for name in spec.names)
    cells = (names, _type(spec), _default(spec.default), spec.allowed, _levels(spec), spec.told.help)
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _users(group: type[OptionGroup]) -> str:
    users = [script.name for script in scripts.SCRIPTS if group in script.groups]
    return "" if len(users) == len(scripts.SCRIPTS) else f"Only in {', '.join(users)}.\n\n"


def option_docs() -> str:
    """The text of docs/options.md."""
    groups = dict.fromkeys(group for script in scripts.SCRIPTS for group in script.groups)
    parts = [HEADER]
    for group in groups:
        rows = "\n".join(_row(spec) for spec in specs_of(group))
        heading = f"## {group.title}\n\n{_users(group)}"
        parts.append(
            f"{heading}| option | type | default | allowed | levels | meaning |\n|---|---|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Write the page, or check it. The exit status is 1 if the check fails."""
    text = option_docs()
    if "--check" in argv:
        fresh = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print(f"{TARGET.name} is {'up to date' if fresh else 'stale: run python tools/make_option_docs.py'}")
        return 0 if fresh else 1
    atomic_write_text(TARGET, text)
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
