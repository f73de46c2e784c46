"""The weighted mean of checkpoint files, tensor by tensor: never more than one tensor of each file is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoint.io import LazyTensor, ModelFile, open_model_file
from library.checkpoint.keymap import same_matrix
from library.checkpoint.sd_keys import VAE_PREFIX, aliases
from library.log import UserError
from library.models import infer
from library.models.spec import FAMILY_TITLES, ArchitectureSpec

_NOT_UNET = (VAE_PREFIX, "cond_stage_model.", "conditioner.")


@dataclass(frozen=True)
class MergeInput:
    """A file that takes part. ``keys``: names of today -> names that stand in the file."""

    file: ModelFile
    ratio: float
    keys: Mapping[str, str]

    def has(self, key: str) -> bool:
        """True if the file has a tensor of this name, perhaps under its old one."""
        return key in self.keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor by its name of today."""
        return self.file.infos[self.keys[key]].shape

    def tensor(self, key: str) -> Tensor:
        """A tensor by its name of today."""
        return self.file.tensor(self.keys[key])


@dataclass(frozen=True)
class Merge:
    """What will be written. ``skipped``: tensors that only later models have; ``filled``: those that a later model
    lacks and the first one stands in for.
    """

    spec: ArchitectureSpec
    tensors: Mapping[str, LazyTensor]
    skipped: tuple[str, ...]
    filled: tuple[str, ...]


def open_inputs(stack: ExitStack, paths: Sequence[Path], ratios: Sequence[float]) -> list[MergeInput]:
    """Open the files until the stack ends."""
    files = [stack.enter_context(open_model_file(path)) for path in paths]
    return [MergeInput(file, ratio, _keys(file)) for file, ratio in zip(files, ratios, strict=True)]


def _keys(file: ModelFile) -> dict[str, str]:
    """A text encoder's old names and new ones may both be there: a tensor counts once, the new name wins."""
    old = aliases(file.infos)
    own = {key: key for key in file.infos if key not in set(old.values())}
    return {**old, **own}


def plan_merge(
    inputs: Sequence[MergeInput],
    unet_only: bool = False,
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Merge:
    """Σ ratio · W over the tensors of the first file; what a later file lacks is the first one's.

    Whole numbers, and with ``unet_only`` all but the U-Net, are the first file's. Raises UserError before anything is
    computed if the files are of different kinds.
    """
    first, *others = inputs
    spec = infer.spec_of_file(first.file.infos, str(first.file.path))
    for other in others:
        _require_same(first, spec, other)
    tensors = {key: _mean(key, inputs, unet_only, precision, device) for key in first.keys}
    skipped = sorted({key for other in others for key in other.keys if not first.has(key)})
    filled = sorted({key for other in others for key in first.keys if not other.has(key)})
    return Merge(spec, tensors, tuple(skipped), tuple(filled))


def _require_same(first: MergeInput, spec: ArchitectureSpec, other: MergeInput) -> None:
    found = infer.spec_of_file(other.file.infos, str(other.file.path))
    if found.family != spec.family:
        titles = f"{FAMILY_TITLES[found.family]}, the first one {FAMILY_TITLES[spec.family]}"
        raise UserError(f"--models {other.file.path}: it is {titles}; only models of one family can be merged")
    wrong = [key for key in first.keys if other.has(key) and not same_matrix(other.shape(key), first.shape(key))]
    if wrong:
        shapes = f"{other.shape(wrong[0])} where the first model has {first.shape(wrong[0])}"
        raise UserError(
            f"--models {other.file.path}: {len(wrong)} tensors have another shape, first {wrong[0]}: {shapes}"
        )


def _mean(
    key: str, inputs: Sequence[MergeInput], unet_only: bool, precision: torch.dtype, device: torch.device | str
) -> LazyTensor:
    first = inputs[0]
    info = first.file.infos[first.keys[key]]
    if not info.torch_dtype.is_floating_point or (unet_only and key.startswith(_NOT_UNET)):
        return first.file.lazy(first.keys[key])

    def read() -> Tensor:
        total = torch.zeros(info.shape, dtype=precision, device=device)
        for term in inputs:
            source = term if term.has(key) else first
            total.add_(source.tensor(key).to(device, precision).reshape(info.shape), alpha=term.ratio)
        return total.cpu()

    return LazyTensor(precision, info.shape, read)


def described(keys: Iterable[str], limit: int = 5) -> str:
    """The first few names and how many more there are."""
    names = list(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
