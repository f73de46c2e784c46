"""The data sets that a run's options describe, of the kinds that its script takes."""

from __future__ import annotations

from library.data.records import DatasetKind, DatasetSpec
from library.data.spec import load_dataset_specs
from library.data.spec_checks import ONLY_CONTROL
from library.options import CacheToolOptions, ConditioningOptions, DataOptions
from library.options.settings import Settings


def dataset_specs(settings: Settings) -> tuple[DatasetSpec, ...]:
    """The checked specifications. Raises UserError with all problems.

    Scripts that train ControlNets take pairs only; the caching tools take whatever a training takes.
    """
    options = settings[DataOptions]
    if ConditioningOptions not in settings:
        return load_dataset_specs(options)
    folder = settings[ConditioningOptions].conditioning_data_dir
    takes_all = CacheToolOptions in settings and (folder is None or options.dataset_config is not None)
    return load_dataset_specs(options, frozenset(DatasetKind) if takes_all else ONLY_CONTROL, folder)
