"""Writing a model that is read tensor by tensor: as a single file or a Diffusers folder, whatever it came from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from library.checkpoint.folders import atomic_folder
from library.checkpoint.io import LazyTensor
from library.checkpoint.modelspec import CHECKPOINT_IMPLEMENTATION, Modelspec, prediction_word
from library.families import family_named
from library.log import UserError
from library.models.save import save_folder_state, single_file_state, write_single_file
from library.models.spec import FamilyName, PredictionType
from library.models.stream import SINGLE_FILE, OpenModel, Parts

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".safetensors", ".ckpt")
_OTHER_SUFFIXES = (".pt", ".pth", ".bin")
_SETTINGS = ("scheduler", "tokenizer", "tokenizer_2")


def is_file_name(target: Path) -> bool:
    """True if a model of this name is a single file, not a folder."""
    return target.suffix.lower() in FILE_SUFFIXES


def check_target(target: Path, option: str) -> None:
    """Raise UserError for a name that a model cannot be written to, or that something else has."""
    if target.suffix.lower() in _OTHER_SUFFIXES:
        raise UserError(f"{option} {target}: a model is a {' or '.join(FILE_SUFFIXES)} file or a Diffusers folder")
    if is_file_name(target):
        if target.is_dir():
            raise UserError(f"{option} {target} is a folder; choose another name")
        return
    is_model = (target / "model_index.json").is_file()
    if target.exists() and not is_model and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{option} {target} exists and is no Diffusers model; name a new folder or a file")


def write_model(
    model: OpenModel,
    changed: Parts,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    prediction: PredictionType | None = None,
    counters: Mapping[str, int] | None = None,
    settings_from: Path | None = None,
    on_tensor: Callable[[], object] = lambda: None,
) -> None:
    """Write the model with the tensors of ``changed`` in the place of its own; by its name a file or a folder.

    One tensor is in memory at a time (but for .ckpt files). From file to file all other tensors are passed through,
    also those that nobody knows. A folder gets tokenizers and scheduler from ``settings_from`` or the model's own
    folder, else the family's. ``prediction``: what the model predicts, None if nobody knows. ``on_tensor`` is called
    after each tensor. Raises WriteError.
    """
    if is_file_name(target):
        tensors, notes = _file_state(model, changed, prediction)
        write_single_file(target, watched(tensors, on_tensor), dtype, {**(metadata or {}), **notes}, counters)
    else:
        _write_folder(model, changed, target, dtype, prediction, settings_from, on_tensor)


def _file_state(
    model: OpenModel, changed: Parts, prediction: PredictionType | None
) -> tuple[Mapping[str, LazyTensor], dict[str, str]]:
    if not model.is_folder:
        return model.in_place(changed)[SINGLE_FILE], {}
    family = family_named(model.found.spec.family)
    markers = () if prediction is None else family.markers(prediction, model.found.zero_terminal_snr)
    tensors, notes = single_file_state(model.found.spec, model.fitted(_merged(model, changed)), markers=markers)
    if prediction is not None:  # a folder says it in its scheduler's settings, which a file does not have
        notes["modelspec.prediction_type"] = prediction_word(prediction == "v_prediction")
    return tensors, notes


def _write_folder(
    model: OpenModel,
    changed: Parts,
    target: Path,
    dtype: torch.dtype | None,
    prediction: PredictionType | None,
    settings_from: Path | None,
    on_tensor: Callable[[], object],
) -> None:
    found = model.found
    parts = {part: watched(tensors, on_tensor) for part, tensors in model.fitted(_merged(model, changed)).items()}
    source = settings_from or (model.path if model.is_folder else None)
    with atomic_folder(target) as temporary:
        told = prediction or _usual_prediction(found.spec.family, target, source)
        save_folder_state(temporary, found.spec, parts, told, dtype, found.zero_terminal_snr)
        for tokenizer, name in zip(family_named(found.spec.family).tokenizers, _SETTINGS[1:], strict=False):
            tokenizer.save_pretrained(temporary / name)
        for name in _SETTINGS if source is not None else ():
            if source is not None and (source / name).is_dir():
                shutil.copytree(source / name, temporary / name, dirs_exist_ok=True)


def _usual_prediction(family: FamilyName, target: Path, source: Path | None) -> PredictionType:
    """What most models of a family predict, for the settings of a scheduler: SD2 is taken for 768-v."""
    if family != "sd2":
        return "epsilon"
    if source is None or not (source / "scheduler").is_dir():
        logger.warning(
            "the model does not say what it predicts: the scheduler of %s is for velocity (v), as of 2.0-v and 2.1-v;"
            " for 2.0-base and 2.1-base set prediction_type to epsilon in its settings",
            target.name,
        )
    return "v_prediction"


def _merged(model: OpenModel, changed: Parts) -> dict[str, dict[str, LazyTensor]]:
    return {part: {**tensors, **changed.get(part, {})} for part, tensors in model.parts.items()}


def modelspec_of(
    family: FamilyName,
    kind: str,
    title: str,
    prediction: PredictionType | None,
    merged_from: Sequence[str] | None = None,
) -> Modelspec:
    """The modelspec block of what a tool writes; ``kind`` is ``lora``, or empty for a whole model.

    A ``prediction`` that nobody knows is not said: whoever uses the file would have to agree with a guess.
    """
    names, usual = family_named(family), prediction or "epsilon"
    side = names.modelspec_resolution(usual)
    return Modelspec(
        architecture=names.modelspec_architecture(usual),
        resolution=(side, side),
        kind=kind,
        implementation=names.modelspec_implementation_network if kind else CHECKPOINT_IMPLEMENTATION,
        title=title,
        merged_from=merged_from,
        v_prediction=None if prediction is None else prediction == "v_prediction",
    )


def watched(tensors: Mapping[str, LazyTensor], on_read: Callable[[], object]) -> dict[str, LazyTensor]:
    """The same tensors; ``on_read`` is called after each has been read."""
    return {key: LazyTensor(tensor.dtype, tensor.shape, _then(tensor, on_read)) for key, tensor in tensors.items()}


def _then(tensor: LazyTensor, on_read: Callable[[], object]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        result = tensor.read()
        on_read()
        return result

    return read
