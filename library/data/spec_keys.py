"""The keys of the data set file: how each is read, where it may stand, and which option it falls back to.

Types and ranges come from the options' own declarations; only the keys that are no command-line options are declared
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from library.data.records import DatasetKind
from library.options.base import OptionSpec, dataset_specs
from library.options.data import DataOptions
from library.options.values import number, switch, text, whole_number

Level = Literal["general", "dataset", "subset"]
LEVELS: tuple[Level, ...] = ("general", "dataset", "subset")

_ANY_KIND = frozenset(DatasetKind)
_DREAMBOOTH = frozenset({DatasetKind.DREAMBOOTH})
_FINETUNE = frozenset({DatasetKind.FINETUNE})
_ONLY_SUBSET: frozenset[Level] = frozenset({"subset"})
ONLY_CONTROL = frozenset({DatasetKind.CONTROL})
_FOLDERS = _DREAMBOOTH | ONLY_CONTROL
_ONLY_FOLDER_OPTIONS = frozenset({"caption_extension"})

CONDITIONING_KEY = "conditioning_data_dir"
"""The key that makes a subset one for ControlNets, or, in a run with masks, names the folder of its masks."""

FOREIGN_KEYS = frozenset(
    {"cache_info", "custom_attributes", "multiline_caption", "resize_interpolation", "validation_seed",
     "validation_split"}
)  # fmt: skip
"""Keys that newer versions of the reference write and that have no counterpart here: passed over with a warning."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key. ``read`` gives the value in its own type, or raises ValueError saying what it must be.

    ``option`` is the command-line option that the key falls back to; ``default`` holds if there is none.
    """

    read: Callable[[Any], Any]
    levels: frozenset[Level]
    kinds: frozenset[DatasetKind] = _ANY_KIND
    option: str | None = None
    default: Any = None
    meaning: str = ""


def _non_empty(raw: Any) -> str:
    if not text(raw).strip():
        raise ValueError("must not be empty")
    return raw


def _repeats(raw: Any) -> int:
    """Unlike the option, a subset may have 0 repeats: it is left out."""
    count = whole_number(raw)
    if count < 0:
        raise ValueError("must be 0 (leave the subset out) or more")
    return count


def _reader(spec: OptionSpec) -> Callable[[Any], Any]:
    """The option's own check, except that an empty text in the file is a value: it overrides the command line."""
    is_plain_text = spec.kind is str and spec.told.convert is None

    def read(raw: Any) -> Any:
        return "" if is_plain_text and raw == "" else spec.check(raw)

    return read


def _all_keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for level in LEVELS:
        for name, spec in dataset_specs([DataOptions], level).items():
            earlier = keys[name].levels if name in keys else frozenset[Level]()
            levels = earlier | frozenset[Level]({level})
            kinds = _FOLDERS if name in _ONLY_FOLDER_OPTIONS else _ANY_KIND
            read = _repeats if name == "num_repeats" else _reader(spec)
            keys[name] = Key(read, levels, kinds, spec.name, meaning=spec.told.help)
    shared: frozenset[Level] = frozenset(LEVELS)
    multiplier_levels: frozenset[Level] = frozenset({"general", "dataset"})
    keys["network_multiplier"] = Key(
        number, multiplier_levels, default=1.0, meaning="strength of the network while it is trained on these images"
    )
    keys["class_tokens"] = Key(text, shared, _DREAMBOOTH, meaning="caption of images without a caption file")
    keys["is_reg"] = Key(switch, _ONLY_SUBSET, _DREAMBOOTH, default=False, meaning="these are regularisation images")
    keys["image_dir"] = Key(_non_empty, _ONLY_SUBSET, meaning="folder that holds the images themselves")
    keys["metadata_file"] = Key(_non_empty, _ONLY_SUBSET, _FINETUNE, meaning="metadata JSON that lists the images")
    keys[CONDITIONING_KEY] = Key(
        _non_empty, _ONLY_SUBSET, meaning="folder with a conditioning picture, or a mask, of the name of each image"
    )
    return keys


KEYS: Mapping[str, Key] = MappingProxyType(_all_keys())


def names_at(level: Level, kind: DatasetKind | None) -> list[str]:
    """The keys that may stand at a level. ``kind`` None (the general table) takes those of every kind."""
    return [name for name, key in KEYS.items() if level in key.levels and (kind is None or kind in key.kinds)]
