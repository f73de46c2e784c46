"""From a command line to checked settings: default < configuration file < command line, the same checks for all."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from library.log import UserError, nearest
from library.options import checks
from library.options.config_file import config_path, config_table, read_config, unique_entries, write_config
from library.options.foreign import changes_training, is_foreign
from library.options.implied import implied
from library.options.parser import read_command_line
from library.options.settings import COMMAND_LINE, Given, ScriptOptions, Settings

__all__ = ["ScriptOptions", "Settings", "parse"]


def _sort_unknown(unknown: Iterable[tuple[str, Given]], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Problems and warnings about names that the script does not have."""
    known = list(names)
    problems: list[str] = []
    warnings: list[str] = []
    for name, given in unknown:
        shown = f"--{name}" if given.where == COMMAND_LINE else f"{given.where}: {name}"
        if not is_foreign(name):
            problems.append(f"{shown}: there is no such option{nearest(name, known)}")
        elif changes_training(name, given.value):
            problems.append(
                f"{given.describe(name)}: this program lacks it, and it changes what is trained; take it out"
            )
        else:
            warnings.append(f"{shown}: ignored: an option of other programs that changes nothing here")
    return problems, warnings


def _converted(script: ScriptOptions, given: Iterable[tuple[str, Given]]) -> tuple[dict[str, Any], list[str]]:
    """Checked values by name (a later one wins), and the problems of all."""
    specs = script.specs()
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, entry in given:
        try:
            values[name] = specs[name].check(entry.value)
        except ValueError as error:
            problems.append(f"{entry.describe(name)}: {error}")
    return values, problems


def _write_and_exit(script: ScriptOptions, name: str | None, values: dict[str, Any]) -> None:
    if not name:
        raise UserError("--output_config: say with --config_file where to write the options")
    path = config_path(name)
    write_config(path, config_table(script, values))
    print(f"options written to {path}")
    sys.exit(0)


def _first_value(given: dict[str, Given], name: str) -> Any:
    return given[name].value if name in given else None


def parse(script: ScriptOptions, argv: Sequence[str] | None = None) -> Settings:
    """Read the command line (``sys.argv`` if None) and the configuration file it names, check everything, and merge.

    Raises UserError that lists all problems. ``--help`` and ``--output_config`` do their work and exit with status 0.
    """
    typed, unknown, problems = read_command_line(script, sys.argv[1:] if argv is None else argv)
    config_name: str | None = _first_value(typed, "config_file")
    writes = _first_value(typed, "output_config") is True
    from_file: dict[str, Given] = {}
    if config_name and not writes:
        specs = script.specs()
        names = {alias: name for name, spec in specs.items() for alias in spec.names}
        entries, form_problems = read_config(config_path(config_name))
        from_file, double_problems = unique_entries(entries, names)
        unknown = [(name, entry) for name, entry in from_file.items() if name not in specs] + unknown
        from_file = {name: entry for name, entry in from_file.items() if name in specs}
        problems = form_problems + double_problems + problems
    unknown = [(name, entry) for name, entry in unknown if name not in script.passes_over]
    name_problems, warnings = _sort_unknown(unknown, script.specs())
    values, value_problems = _converted(script, [*from_file.items(), *typed.items()])
    problems += name_problems + value_problems
    if problems:
        raise UserError.of(problems)
    if writes:
        _write_and_exit(script, config_name, values)
    return _checked(script, values, {**from_file, **typed}, warnings)


def _checked(script: ScriptOptions, values: dict[str, Any], given: dict[str, Given], warnings: list[str]) -> Settings:
    """Settings after the checks across options. Raises UserError that lists all problems."""
    sources = {name: entry.where for name, entry in given.items()}
    brought, notes = implied(values, script.specs())
    draft = Settings(script, {**values, **brought}, sources)
    problems = [*checks.problems(draft), *checks.missing(draft)]
    if problems:
        raise UserError.of(problems)
    return Settings(script, draft.as_flat_dict(), sources, (*warnings, *notes, *checks.warnings(draft)))
