"""What makes a training script: a frozen row that its entry file holds. Light to import, so that --help answers at
once.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.options.settings import FamilyChoice, ScriptOptions


@dataclass(frozen=True)
class Script:
    """``kind`` is ``module:function`` of the kind of training: called with (settings, family, parts), gives a
    Trainable.

    ``tracker_name`` is the name of the TensorBoard folder or wandb project when none is given.
    """

    options: ScriptOptions
    kind: str
    tracker_name: str

    @property
    def family(self) -> FamilyChoice:
        """What kind of base model the script is for."""
        return self.options.family
