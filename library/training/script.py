"""What makes a training script: a frozen row that its entry file holds. Light to import, so that --help answers at
once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.settings import ScriptOptions

if TYPE_CHECKING:
    from library.training.trainable import Trainable


@dataclass(frozen=True)
class Script:
    """``kind`` is ``module:class`` of the kind of training, a Trainable that is made of (settings, family, parts).

    ``tracker_name`` is the name of the TensorBoard folder or wandb project when none is given.
    """

    options: ScriptOptions
    kind: str
    tracker_name: str

    def load_kind(self) -> type[Trainable]:
        """The class, imported now."""
        module, _, name = self.kind.partition(":")
        return getattr(importlib.import_module(module), name)
