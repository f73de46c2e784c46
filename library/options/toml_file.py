"""Reading TOML, so that an error can say where it is."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.log import UserError
from library.options.lines import line_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore


@dataclass(frozen=True)
class TomlFile:
    """A parsed file."""

    path: Path
    text: str
    data: dict[str, Any]

    def where(self, *keys: str) -> str:
        """Place for messages, file and line, of what the keys of tables within tables lead to."""
        line = line_of(self.text, False, self.data, keys)
        return f"{self.path} line {line}" if line else str(self.path)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError that says what is wrong, with line and column."""
    return tomllib.loads(text)


def read_utf8(path: Path, option_name: str) -> str:
    """The text of a UTF-8 file, with or without a mark in front. Raises UserError that names option and file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--{option_name}: there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--{option_name}: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"--{option_name}: {path} cannot be read ({error.strerror or error})") from error


def read_toml(path: Path, option_name: str) -> TomlFile:
    """Read a UTF-8 TOML file. Raises UserError that names the option, the file and, for bad syntax, the line."""
    text = read_utf8(path, option_name)
    try:
        return TomlFile(path, text, parse_toml(text))
    except ValueError as error:
        raise UserError(f"--{option_name}: {path} is no valid TOML: {error}{_hint(text, str(error))}") from error


def _hint(text: str, message: str) -> str:
    """What a beginner probably meant in the line that a message names; empty if there is no guess."""
    number = re.search(r"at line (\d+)", message)
    line = text.splitlines()[int(number[1]) - 1] if number and int(number[1]) <= len(text.splitlines()) else ""
    if "\\" in line:
        return "; write paths with / in place of \\"
    if re.search(r"=\s*(True|False)\b", line):
        return "; write true and false in small letters"
    if re.search(r"=\s*[^\s\d\"'\[{+-]", line):
        return '; texts need straight quotes: "text"'
    return ""
