"""The options of a run after all sources were merged and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from library.models.spec import FamilyName
from library.options.base import OptionGroup, OptionSpec, specs_by_name

Group = TypeVar("Group", bound=OptionGroup)
DEFAULT = "default"
COMMAND_LINE = "command line"
FamilyChoice = Literal["sd"] | FamilyName
"""``sd`` is SD1, or SD2 with ``v2``."""


@dataclass(frozen=True)
class Given:
    """A value as the user gave it, before any check; ``where`` is `COMMAND_LINE` or file and line."""

    value: Any
    where: str

    def describe(self, name: str) -> str:
        """The place, name and value for a message."""
        if self.where == COMMAND_LINE:
            shown = " ".join(self.value) if isinstance(self.value, list) else str(self.value)
            return f"--{name} {shown}" if not isinstance(self.value, bool) else f"--{name}"
        shown = f'"{self.value}"' if isinstance(self.value, str) else repr(self.value)
        shown = shown.lower() if isinstance(self.value, bool) else shown
        return f"{self.where}: {name} = {shown}"


@dataclass(frozen=True)
class ScriptOptions:
    """What options a script has. ``defaults`` replaces declared defaults by name.

    ``required``: names that must be set to train; a tuple among them means at least one of these.
    ``summary``: the first line of --help. ``family``: what kind of base model the script is for. ``passes_over``:
    names of other scripts' options, which stand in shared configuration files and mean nothing here.
    """

    name: str
    groups: tuple[type[OptionGroup], ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str | tuple[str, ...], ...] = ()
    summary: str = ""
    family: FamilyChoice = "sd"
    passes_over: frozenset[str] = frozenset()

    def specs(self) -> dict[str, OptionSpec]:
        """All options of the script by name."""
        return specs_by_name(self.groups)

    def default_of(self, spec: OptionSpec) -> Any:
        """The value of an option that is given nowhere."""
        return self.defaults.get(spec.name, spec.default)


class Settings:
    """One instance of each group of a script, and where each value came from.

    ``settings[NoiseOptions]`` is the group. ``warnings`` are lines for the log, to be shown once logging is set up.
    """

    def __init__(
        self,
        script: ScriptOptions,
        values: Mapping[str, Any],
        sources: Mapping[str, str],
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.script = script
        self.warnings = warnings
        self._specs = script.specs()
        self._sources = dict(sources)
        self._values = {name: values.get(name, script.default_of(spec)) for name, spec in self._specs.items()}
        self._groups = {
            group: group(**{name: self._values[name] for name in specs_by_name((group,))}) for group in script.groups
        }

    def __getitem__(self, group: type[Group]) -> Group:
        """The group's instance. Raises KeyError if the script has no such group."""
        instance = self._groups[group]
        assert isinstance(instance, group)
        return instance

    def __contains__(self, group: type[OptionGroup]) -> bool:
        return group in self._groups

    @property
    def family(self) -> FamilyChoice:
        """What kind of base model the run is for: the script's, or SDXL if --sdxl says so."""
        return "sdxl" if self.value_of("sdxl") else self.script.family

    def given(self, name: str) -> bool:
        """True if the user set the option, in the file or on the command line."""
        return name in self._sources

    def source_of(self, name: str) -> str:
        """``command line``, file and line, or ``default``. Raises KeyError if the script has no such option."""
        return self._sources.get(self._specs[name].name, DEFAULT)

    def value_of(self, name: str) -> Any:
        """The value of an option by name; None if the script has no such option."""
        return self._values.get(name)

    def as_flat_dict(self) -> dict[str, Any]:
        """All options by name, with secrets."""
        return dict(self._values)

    def scrubbed_dict(self) -> dict[str, Any]:
        """All options by name, without secrets: for files, logs and trackers."""
        return {name: value for name, value in self._values.items() if not self._specs[name].told.secret}
