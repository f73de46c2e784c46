"""Write a model whose tensors were changed: single file or Diffusers folder, in the form it had or in the other one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoint.io import LazyTensor, save_safetensors
from library.checkpoint.sdxl_keys import MARKERS
from library.families import family_for
from library.families.base import ModelFamily
from library.log import Progress, UserError, progress
from library.models.load import WEIGHT_STEMS
from library.models.save import save_folder_state, single_file_state, whole_folder, write_single_file
from library.models.spec import ArchitectureSpec, PredictionType
from library.models.stream import SINGLE_FILE, OpenModel, Parts
from library.options import ModelOptions

FILE_SUFFIXES = (".safetensors", ".ckpt")
_OTHER_SUFFIXES = (".pt", ".pth", ".bin")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".onnx", ".h5")
_TOKENIZERS = ("tokenizer", "tokenizer_2")


def is_file_target(target: Path) -> bool:
    """True if the name is that of a single file, False if it is that of a folder. Raises UserError for other files."""
    suffix = target.suffix.lower()
    if suffix in _OTHER_SUFFIXES:
        raise UserError(f"--save_to {target}: a model is a {' or '.join(FILE_SUFFIXES)} file or a Diffusers folder")
    if suffix in FILE_SUFFIXES:
        if target.is_dir():
            raise UserError(f"--save_to {target} is a folder; choose another name")
        return True
    is_model = (target / "model_index.json").is_file()
    if target.exists() and not is_model and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(
            f"--save_to {target} exists and is no Diffusers model; name a new folder or a .safetensors file"
        )
    return False


def family_of(spec: ArchitectureSpec) -> ModelFamily:
    """The family object of an architecture: names for metadata, tokenizers."""
    return family_for(ModelOptions(v2=spec.family == "sd2"), "sdxl" if spec.family == "sdxl" else "sd")


def write_model(
    model: OpenModel,
    changed: Parts,
    target: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    prediction: PredictionType,
) -> None:
    """Write the model with the changed tensors, one in memory at a time (a .ckpt: all).

    ``dtype``: what all floating point tensors are saved in; None: each in its own type.
    """
    as_file = is_file_target(target)
    keeps_form = model.is_folder is not as_file
    parts = {name: {**tensors, **changed.get(name, {})} for name, tensors in model.parts.items()}
    tensors = model.in_place(changed) if keeps_form else model.fitted(parts)
    with progress(sum(len(own) for own in tensors.values()), "merging") as bar:
        tensors = _watched(tensors, bar)
        if as_file and keeps_form:
            write_single_file(target, tensors[SINGLE_FILE], dtype, {**metadata, "format": "pt"})
        elif as_file:
            markers = MARKERS[: _marker_count(model, prediction)]
            single, notes = single_file_state(model.found.spec, tensors, markers=markers)
            write_single_file(target, single, dtype, {**metadata, **notes, "format": "pt"})
        else:
            with whole_folder(target) as temporary:
                if keeps_form:
                    _copy_folder(model, tensors, temporary, dtype)
                else:
                    _new_folder(model, tensors, temporary, dtype, prediction)


def _marker_count(model: OpenModel, prediction: PredictionType) -> int:
    """How many of SDXL's markers a file needs to say what the folder's scheduler said."""
    if model.found.spec.family != "sdxl" or prediction != "v_prediction":
        return 0
    return 2 if model.found.zero_terminal_snr else 1


def _copy_folder(model: OpenModel, stored: Parts, folder: Path, dtype: torch.dtype | None) -> None:
    """All that a Diffusers folder holds, with new weights in the parts that were read."""

    def replaced(directory: str, names: list[str]) -> list[str]:
        if Path(directory).name not in stored or Path(directory).parent != model.path:
            return []
        return [name for name in names if name.endswith(_WEIGHT_SUFFIXES) or ".index." in name]

    shutil.copytree(model.path, folder, ignore=replaced, dirs_exist_ok=True)
    for place, tensors in stored.items():
        save_safetensors(folder / place / f"{WEIGHT_STEMS[place]}.safetensors", tensors, {"format": "pt"}, dtype)


def _new_folder(
    model: OpenModel, parts: Parts, folder: Path, dtype: torch.dtype | None, prediction: PredictionType
) -> None:
    spec = model.found.spec
    save_folder_state(folder, spec, parts, prediction, dtype, model.found.zero_terminal_snr)
    for tokenizer, name in zip(family_of(spec).tokenizers, _TOKENIZERS, strict=False):
        tokenizer.save_pretrained(folder / name)


def _watched(parts: Parts, bar: Progress[int]) -> dict[str, dict[str, LazyTensor]]:
    return {
        place: {key: LazyTensor(value.dtype, value.shape, _counted(value.read, bar)) for key, value in tensors.items()}
        for place, tensors in parts.items()
    }


def _counted(read: Callable[[], Tensor], bar: Progress[int]) -> Callable[[], Tensor]:
    def read_and_count() -> Tensor:
        tensor = read()
        bar.advance()
        return tensor

    return read_and_count
