"""Write a model whose tensors were changed: single file or Diffusers folder, in the form it had or in the other one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from library.checkpoint.folders import atomic_folder
from library.checkpoint.io import save_safetensors
from library.families.files import is_file_name, watched, write_model
from library.log import progress
from library.models.spec import WEIGHT_STEMS, PredictionType
from library.models.stream import OpenModel, Parts

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".onnx", ".h5")


def write_merged(
    model: OpenModel,
    changed: Parts,
    target: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    prediction: PredictionType | None,
) -> None:
    """Write the model with the changed tensors, one in memory at a time (a .ckpt: all).

    ``dtype``: what all floating point tensors are saved in; None: each in its own type. From folder to folder all that
    stands beside the weights is kept.
    """
    count = sum(len(tensors) for tensors in (model.stored if is_file_name(target) else model.parts).values())
    with progress(count, "merging") as bar:
        if model.is_folder and not is_file_name(target):
            with atomic_folder(target) as temporary:
                _copy_folder(model, changed, temporary, dtype, bar.advance)
        else:
            told = {**metadata, "format": "pt"}
            write_model(
                model, changed, target, dtype=dtype, metadata=told, prediction=prediction, on_tensor=bar.advance
            )


def _copy_folder(
    model: OpenModel, changed: Parts, folder: Path, dtype: torch.dtype | None, on_tensor: Callable[[], object]
) -> None:
    """All that a Diffusers folder holds, with new weights in the parts that were read."""

    def replaced(directory: str, names: list[str]) -> list[str]:
        place = Path(directory)
        if place.name not in model.stored or place.parent != model.path:
            return []
        return [name for name in names if name.endswith(_WEIGHT_SUFFIXES) or ".index." in name]

    shutil.copytree(model.path, folder, ignore=replaced, dirs_exist_ok=True)
    for place, tensors in model.in_place(changed).items():
        file = folder / place / f"{WEIGHT_STEMS[place]}.safetensors"
        save_safetensors(file, watched(tensors, on_tensor), {"format": "pt"}, dtype)
