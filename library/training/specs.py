"""The data sets that a run's options describe, of the kinds that its script takes."""

from __future__ import annotations

from library.data.records import DatasetKind, DatasetSpec
from library.data.spec import load_dataset_specs
from library.data.spec_keys import ONLY_CONTROL
from library.log import UserError
from library.options import CacheToolOptions, ConditioningOptions, DataOptions, LossOptions
from library.options.settings import Settings


def dataset_specs(settings: Settings) -> tuple[DatasetSpec, ...]:
    """The checked specifications. Raises UserError with all problems.

    Scripts that train ControlNets take pairs only; the caching tools take whatever a training takes.
    """
    options, folder = settings[DataOptions], settings.value_of("conditioning_data_dir")
    masks = settings[LossOptions].masked_loss
    if masks or ConditioningOptions not in settings:
        specs = load_dataset_specs(options, conditioning_data_dir=folder, masks=masks)
        if masks and not any(subset.mask_dir or subset.alpha_mask for spec in specs for subset in spec.subsets):
            raise UserError(
                "--masked_loss: no masks are named; give subsets a conditioning_data_dir, or use --alpha_mask"
            )
        return specs
    takes_all = CacheToolOptions in settings and (folder is None or options.dataset_config is not None)
    return load_dataset_specs(options, frozenset(DatasetKind) if takes_all else ONLY_CONTROL, folder)
