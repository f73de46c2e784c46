"""The command line: argparse built from the declarations. Values stay text here; the options' own checks come later."""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Sequence
from typing import Any, NoReturn

from library.log import UserError
from library.options.base import OptionSpec, specs_of
from library.options.settings import COMMAND_LINE, Given, ScriptOptions

EPILOG = (
    "Every switch has an opposite with --no- before its name (--no-v2), to undo what a configuration file switched on."
)

_NEGATIVE_EXPONENT = re.compile(r"-\d*\.?\d+[eE][+-]?\d+$")


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage, which is pages long here."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's complaint."""
        raise UserError(f"command line: {message}; see --help")


def _metavar(spec: OptionSpec) -> str:
    if spec.choices:
        return "{" + ",".join(str(choice) for choice in spec.choices) + "}"
    return spec.told.metavar or ("KEY=VALUE" if spec.told.pairs else "N" if spec.kind in (int, float) else "TEXT")


def _help(spec: OptionSpec, default: Any) -> str:
    facts = [f"default {default}"] if default not in (None, False, "") else []
    if not spec.choices and spec.allowed:
        facts.append(spec.allowed)
    text = f"{spec.told.help} ({'; '.join(facts)})" if facts else spec.told.help
    return text.replace("%", "%%")


def _usage(script: ScriptOptions) -> str:
    specs = script.specs()
    words = [
        f"[{name}]" if spec.is_optional and name not in script.required else name
        for name, spec in specs.items()
        if spec.told.positional
    ]
    config = ["[--config_file FILE]"] if "config_file" in specs else []
    return " ".join(["%(prog)s", *config, *words, "[options]"])


def build_parser(script: ScriptOptions) -> argparse.ArgumentParser:
    """The parser of a script. Its namespace holds only what was given, as text."""
    parser = _Parser(
        prog=script.name,
        description=script.summary or None,
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage=_usage(script),
    )
    for group in script.groups:
        section = parser.add_argument_group(group.title)
        for spec in specs_of(group):
            flags = [f"--{name}" for name in spec.names] + ([f"-{spec.told.short}"] if spec.told.short else [])
            text = _help(spec, script.default_of(spec))
            if spec.is_flag:
                section.add_argument(*flags, dest=spec.name, action="store_const", const=True, help=text)
                off = [f"--no-{name}" for name in spec.names]
                section.add_argument(*off, dest=spec.name, action="store_const", const=False, help=argparse.SUPPRESS)
            else:
                many = "*" if spec.is_list else None
                section.add_argument(*flags, dest=spec.name, nargs=many, metavar=_metavar(spec), help=text)
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """The words with ``--name -1e-3`` as ``--name=-1e-3``: argparse takes such a number for an option."""
    words: list[str] = []
    for word in argv:
        if _NEGATIVE_EXPONENT.match(word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _unknown_options(rest: Sequence[str]) -> tuple[list[tuple[str, Given]], list[str]]:
    """What argparse left over: unknown options with their values, and words that belong to no option."""
    options: list[tuple[str, Given]] = []
    words: list[str] = []
    for word in rest:
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            options.append((name, Given(value if sign else True, COMMAND_LINE)))
        elif options and options[-1][1].value is True:
            options[-1] = (options[-1][0], Given(word, COMMAND_LINE))
        else:
            words.append(word)
    return options, words


def read_command_line(
    script: ScriptOptions, argv: Sequence[str]
) -> tuple[dict[str, Given], list[tuple[str, Given]], list[str]]:
    """What the command line gives: known options, unknown options, problems. ``--help`` prints and exits."""
    namespace, rest = build_parser(script).parse_known_args(_joined(argv))
    known = {name: Given(value, COMMAND_LINE) for name, value in vars(namespace).items()}
    unknown, words = _unknown_options(rest)
    # argparse's own positional arguments would take what belongs to options that take lists
    places = [spec.name for spec in script.specs().values() if spec.told.positional and spec.name not in known]
    known |= {name: Given(word, COMMAND_LINE) for name, word in zip(places, words, strict=False)}
    words = words[len(places) :]
    switches = {f"--{name}" for spec in script.specs().values() if spec.is_flag for name in spec.names}
    before = dict(zip(argv[1:], argv, strict=False))
    return known, unknown, [_stray(word, before.get(word, ""), switches) for word in words]


def _stray(word: str, before: str, switches: Container[str]) -> str:
    """What is wrong with a word that belongs to no option, and with the word before it."""
    if before in switches and word.lower() in ("true", "false"):
        right = before if word.lower() == "true" else f"--no-{before[2:]}"
        return f"command line: {before} {word}: a switch takes no value; write {right}"
    if word.startswith(("\N{EN DASH}", "\N{EM DASH}")):
        return f"command line: {word!r} begins with a long dash; write two hyphens"
    return f"command line: {word!r} belongs to no option; texts with blanks need quotes"
