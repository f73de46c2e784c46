"""What an option is: one declaration gives the flag, the TOML key, the check, the help text and the documentation row.

Options stand in groups: frozen dataclasses of which each concern has one. Plain dataclasses with the checks below
rather than a validation library, because ``--help`` has to answer at once and such a library costs more than the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin

from library.log import UserError
from library.options.values import PARSERS, Bounds, check_choice, means_nothing, split_pair, word_pair

Scope = Literal["cli", "general", "dataset", "subset"]
PairsOf = Literal["word", "text"]
CLI_ONLY: frozenset[Scope] = frozenset({"cli"})
DATASET_LEVELS: frozenset[Scope] = frozenset({"cli", "general", "dataset"})
SUBSET_LEVELS: frozenset[Scope] = frozenset({"cli", "general", "dataset", "subset"})


@dataclass(frozen=True)
class Declaration:
    """What `option` was told about a field beside its name, type and default."""

    help: str
    bounds: Bounds
    scope: frozenset[Scope]
    dataset_key: str | None
    aliases: tuple[str, ...]
    metavar: str | None
    secret: bool
    convert: Callable[[Any], Any] | None
    pairs: PairsOf | None
    short: str | None = None
    positional: bool = False


def option(
    default: Any,
    *,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    multiple_of: int | None = None,
    scope: frozenset[Scope] = CLI_ONLY,
    dataset_key: str | None = None,
    aliases: tuple[str, ...] = (),
    metavar: str | None = None,
    secret: bool = False,
    convert: Callable[[Any], Any] | None = None,
    pairs: PairsOf | None = None,
    short: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a field of an option group.

    ``scope``: where the option may stand: the command line and the levels of a data set file, there as ``dataset_key``
    if the name differs. ``secret``: never written anywhere. ``convert``: takes the place of the check derived from the
    field's type; it gets text or a TOML value and raises ValueError with what is wanted. ``pairs``: every item must be
    ``key=value``, the value a word (number, list) or any text. ``short``: one letter that stands for it (``-s``).
    ``positional``: may stand without its name.
    """
    bounds = Bounds(ge=ge, gt=gt, le=le, lt=lt, multiple_of=multiple_of)
    told = Declaration(help, bounds, scope, dataset_key, aliases, metavar, secret, convert, pairs, short, positional)
    return dataclasses.field(default=default, metadata={"declaration": told})


_PLACES = ("DIR", "FILE", "PATH", "MODEL")  # what metavar says where a value names something on the disk


@dataclass(frozen=True)
class OptionSpec:
    """One option as read from its field. ``kind`` is the type of a single value; scripts may replace ``default``."""

    name: str
    kind: type
    choices: tuple[Any, ...]
    is_list: bool
    is_optional: bool
    default: Any
    told: Declaration

    @property
    def is_flag(self) -> bool:
        """True if the option is a switch without a value."""
        return self.kind is bool

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.told.aliases)

    @property
    def _is_word(self) -> bool:
        """True if a value may be any word: it is none of a few, and names no file or folder."""
        return not self.choices and self.told.metavar not in _PLACES

    @property
    def dataset_key(self) -> str:
        """The key of this option in a data set file."""
        return self.told.dataset_key or self.name

    @property
    def allowed(self) -> str:
        """Choices or range in words; empty if anything goes."""
        if self.choices:
            return ", ".join(str(choice) for choice in self.choices)
        return self.told.bounds.text()

    def check(self, raw: Any) -> Any:
        """The value that ``raw`` means: text of the command line, a TOML or JSON value, or a Python value.

        Raises ValueError that says what is wanted ("must be a whole number").
        """
        if raw is None or (self.is_optional and means_nothing(raw, self.kind, self._is_word)):
            if self.is_optional:
                return None
            raise ValueError("must have a value")
        if self.told.convert is not None:
            return self.told.convert(raw)
        if not self.is_list:
            return self._check_one(raw)
        items = list(raw) if isinstance(raw, list | tuple) else [raw]
        return [self._check_one(item) for item in items]

    def _check_one(self, raw: Any) -> Any:
        if self.choices:
            return check_choice(raw, self.choices)
        value: Any = PARSERS[self.kind](raw)
        if self.kind in (int, float):
            self.told.bounds.check(value)
        if self.told.pairs == "word":
            word_pair(value)
        elif self.told.pairs == "text":
            split_pair(value)
        return value


class OptionGroup:
    """Base of all groups. Values given in Python pass the same checks as those of files and command lines."""

    title: ClassVar[str] = ""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for spec in specs_of(type(self)):
            raw = getattr(self, spec.name)
            try:
                object.__setattr__(self, spec.name, spec.check(raw))
            except ValueError as error:
                problems.append(f"{spec.name} = {raw!r}: {error}")
        if problems:
            raise UserError.of(problems)


def _plain(annotation: Any) -> tuple[Any, bool]:
    """The annotation without ``| None``, and whether that was there."""
    if get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return parts[0], len(parts) < len(get_args(annotation))
    return annotation, False


def _spec(field: dataclasses.Field[Any], annotation: Any) -> OptionSpec:
    told: Declaration = field.metadata["declaration"]
    plain, is_optional = _plain(annotation)
    is_list = get_origin(plain) is list
    item = get_args(plain)[0] if is_list else plain
    choices = get_args(item) if get_origin(item) is Literal else ()
    if choices:
        item = type(choices[0])
    while get_origin(item) is tuple:
        item = get_args(item)[0]
    return OptionSpec(field.name, item, choices, is_list, is_optional, field.default, told)


@functools.cache
def specs_of(group: type[OptionGroup]) -> tuple[OptionSpec, ...]:
    """The options of a group in the order of their declaration."""
    hints = typing.get_type_hints(group)
    fields = dataclasses.fields(group)  # pyright: ignore[reportArgumentType]
    return tuple(_spec(field, hints[field.name]) for field in fields)


def specs_by_name(groups: Iterable[type[OptionGroup]]) -> dict[str, OptionSpec]:
    """All options of some groups. Raises ValueError if two have the same name or alias."""
    found: dict[str, OptionSpec] = {}
    taken: set[str] = set()
    for spec in (spec for group in groups for spec in specs_of(group)):
        if taken.intersection(spec.names):
            raise ValueError(f"option {spec.name} is declared twice")
        taken.update(spec.names)
        found[spec.name] = spec
    return found


def dataset_specs(groups: Iterable[type[OptionGroup]], level: Scope) -> dict[str, OptionSpec]:
    """The options that may stand at a level of a data set file, by their key in that file."""
    return {spec.dataset_key: spec for spec in specs_by_name(groups).values() if level in spec.told.scope}
