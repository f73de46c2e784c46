"""``--dataset_class``: a data set of the user's own, instead of the built-in ones.

The class is named ``package.module.Class`` and is called with keyword arguments only: ``resolution`` (width, height),
``batch_size`` (samples of every batch) and ``seed``. It should take ``**others`` too, so that later
versions can tell it more. The object must offer what `UserDataset` says. The batches of all epochs must be functions
of their arguments: then the number of workers changes nothing and an interrupted run can be resumed.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from library.data.records import Batch, CaptionClock, Size
from library.log import UserError


class UserDataset(Protocol):
    """What an own data set offers."""

    def __len__(self) -> int:
        """Batches of an epoch, over all processes."""
        ...

    def load(self, index: int, clock: CaptionClock) -> Batch:
        """Batch ``index`` of epoch ``clock.epoch`` (from 1); called from several threads at once."""
        ...


def find_class(name: str) -> Any:
    """Import the class. Raises UserError if the name leads nowhere.

    It is code of the user's choice and runs with the user's rights.
    """
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise UserError(f"--dataset_class {name}: must be package.module.Class")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise UserError(f"--dataset_class {name}: cannot be imported ({error})") from error
    except AttributeError as error:
        raise UserError(f"--dataset_class {name}: module {module_name} has no {class_name}") from error


def load_user_dataset(name: str, *, resolution: Size | None, batch_size: int, seed: int) -> UserDataset:
    """Make an object of the class. Raises UserError if the name leads nowhere or the object lacks what it must have."""
    made = find_class(name)
    try:
        dataset = made(resolution=resolution, batch_size=batch_size, seed=seed)
    except TypeError as error:
        raise UserError(
            f"--dataset_class {name}: cannot be made with resolution, batch_size and seed ({error})"
        ) from error
    missing = [method for method in ("__len__", "load") if not callable(getattr(dataset, method, None))]
    if missing:
        raise UserError(f"--dataset_class {name}: the object lacks {' and '.join(missing)}")
    if not len(dataset):
        raise UserError(f"--dataset_class {name}: it has no batches")
    return cast("UserDataset", dataset)
