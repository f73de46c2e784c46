"""``--config_file`` and ``--output_config``: options from and to a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.log import UserError
from library.options.base import OptionSpec
from library.options.settings import Given, ScriptOptions
from library.options.toml_file import read_toml

DATASET_TABLES = ("general", "datasets", "subsets")


def config_path(name: str) -> Path:
    """The file that ``--config_file`` means: ``.toml`` is appended unless it is there."""
    return Path(name if name.endswith(".toml") else name + ".toml")


def read_config(path: Path) -> tuple[list[tuple[str, Given]], list[str]]:
    """All entries of the file, with those of its tables (whose names mean nothing), and the problems of its form.

    Raises UserError if it cannot be read at all.
    """
    file = read_toml(path, "config_file")
    entries: list[tuple[str, Given]] = []
    problems: list[str] = []
    for key, value in file.data.items():
        inner = value if isinstance(value, dict) else {key: value}
        if key in DATASET_TABLES:
            where = file.where(key)
            problems.append(
                f"{where}: [{key}] belongs to a data set file; move it to one and give that as dataset_config"
            )
            continue
        for name, item in inner.items():
            where = file.where(key, name) if isinstance(value, dict) else file.where(key)
            if isinstance(item, dict):
                problems.append(f"{where}: [{key}.{name}] is a table in a table; put its keys one level up")
            else:
                entries.append((name, Given(item, where)))
    return entries, problems


def unique_entries(entries: list[tuple[str, Given]], names: Mapping[str, str]) -> tuple[dict[str, Given], list[str]]:
    """The entries by their true name (``names`` maps aliases), and a problem for each that stands twice."""
    found: dict[str, Given] = {}
    problems: list[str] = []
    for name, given in entries:
        true_name = names.get(name, name)
        if true_name in found:
            problems.append(f"{given.where}: {name} is set already at {found[true_name].where}; keep one of them")
        else:
            found[true_name] = given
    return found, problems


def _as_toml(value: Any) -> Any:
    """A value in the form that the reader takes; None as text that means it."""
    if value is None:
        return "None"
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value) if isinstance(value, Path) else value


def config_table(script: ScriptOptions, values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--output_config`` writes: options that differ from their default, without secrets and its own two."""
    table: dict[str, Any] = {}
    for name, spec in script.specs().items():
        value = values.get(name)
        skip = spec.told.secret or name in ("config_file", "output_config")
        if not skip and name in values and value != script.default_of(spec):
            table[name] = "" if value is None and _is_text(spec) else _as_toml(value)
    return table


def _is_text(spec: OptionSpec) -> bool:
    return spec.kind in (str, Path) and not spec.choices


def write_config(path: Path, table: Mapping[str, Any]) -> None:
    """Write a new configuration file, whole or not at all. Raises UserError if it exists or cannot be written."""
    import tomli_w

    from library.checkpoint.io import atomic_write_text

    if path.exists():
        raise UserError(f"--output_config: {path} exists already; choose another name for --config_file")
    try:
        atomic_write_text(path, tomli_w.dumps(table))
    except OSError as error:
        raise UserError(f"--output_config: {path} cannot be written ({error.strerror or error})") from error
