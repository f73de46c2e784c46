"""Convert a model between a checkpoint file and a Diffusers folder: SD 1.x, SD 2.x and SDXL.

``python tools/convert_diffusers20_original_sd.py model.safetensors folder --fp16``
"""

from __future__ import annotations

import ast
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.log import UserError, progress
from library.options.model_tools import ConvertModelOptions
from library.options.scripts import CONVERT_MODEL
from library.options.settings import Settings

if TYPE_CHECKING:
    from library.models.load import Recognised
    from library.models.spec import ArchitectureSpec, PredictionType

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(CONVERT_MODEL, convert, argv)


def convert(settings: Settings) -> int:
    """Write the model of the options in its other form; returns the exit status. Raises UserError."""
    from library.device import save_dtype
    from library.families.files import check_target, is_file_name, write_model
    from library.families.sdxl import SdxlFamily
    from library.families.stable import find_source
    from library.hub import MODEL_PARTS
    from library.models.load import check_written
    from library.models.stream import open_model

    options = settings[ConvertModelOptions]
    dtype, metadata = save_dtype(_precision(options)), _metadata(options.metadata)
    parts = SdxlFamily.parts_on_hub if options.sdxl else MODEL_PARTS
    source = find_source(options.model_to_load or "", "model_to_load", parts, variant=options.variant)
    target = Path(options.model_to_save or "")
    if target.resolve() == source.path:
        raise UserError(f"model_to_save {target} is the model to load; choose another name")
    check_target(target, "model_to_save")
    form = ("ckpt" if target.suffix.lower() == ".ckpt" else "file") if is_file_name(target) else "folder"
    _tell_unused(options, form, is_from_folder=source.path.is_dir())
    if options.reference_model and not Path(options.reference_model).is_dir():
        raise UserError(f"--reference_model {options.reference_model}: there is no such folder")
    with open_model(source.path, options.variant) as model:
        _require_family(options, model.found.spec)
        count = sum(len(tensors) for tensors in (model.stored if is_file_name(target) else model.parts).values())
        with progress(count, "converting") as bar:
            write_model(
                model,
                {},
                target,
                dtype=dtype,
                metadata={**model.metadata, **metadata},
                prediction=_prediction(options, model.found),
                counters={"epoch": options.epoch, "global_step": options.global_step},
                settings_from=Path(options.reference_model) if options.reference_model else None,
                on_tensor=bar.advance,
            )
    for line in check_written(target, model.found.spec):
        logger.info("%s", line)
    return 0


_FORMS = {"epoch": ("ckpt",), "global_step": ("ckpt",), "metadata": ("file",), "reference_model": ("folder",)}
"""What of a form of model an option is for."""


def _tell_unused(options: ConvertModelOptions, form: str, is_from_folder: bool) -> None:
    titles = {"ckpt": ".ckpt file", "file": "safetensors file", "folder": "Diffusers folder"}
    for name, forms in _FORMS.items():
        if getattr(options, name) and form not in forms:
            logger.warning("--%s: a %s has no place for it, only a %s", name, titles[form], titles[forms[0]])
    if options.variant and not is_from_folder:
        logger.warning("--variant: a single file has none")


def _precision(options: ConvertModelOptions) -> str | None:
    flags = {"fp16": options.fp16, "bf16": options.bf16, "float": options.float}
    chosen = [name for name, is_set in flags.items() if is_set] + [options.save_precision_as or ""]
    given = {name for name in chosen if name}
    if len(given) > 1:
        raise UserError(f"{' and '.join(sorted(given))}: the model can be saved in one precision only")
    return next(iter(given), None)


def _metadata(text: str | None) -> dict[str, str]:
    """Entries from JSON, or from the Python notation of older command lines; nothing in it is run."""
    if not text:
        return {}
    try:
        found: Any = json.loads(text)
    except ValueError:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found = None
    if not isinstance(found, dict):
        raise UserError(f'--metadata {text}: must be JSON such as {{"key": "value"}}')
    return {str(key): str(value) for key, value in found.items()}


def _require_family(options: ConvertModelOptions, spec: ArchitectureSpec) -> None:
    from library.models.spec import FAMILY_TITLES

    for name, family in (("v1", "sd1"), ("v2", "sd2"), ("sdxl", "sdxl")):
        if getattr(options, name) and spec.family != family:
            raise UserError(f"--{name}: {options.model_to_load} is {FAMILY_TITLES[spec.family]}; leave the option out")


def _prediction(options: ConvertModelOptions, found: Recognised) -> PredictionType | None:
    asked: PredictionType | None = "v_prediction" if options.v_parameterization else None
    if options.v_parameterization and found.prediction_type == "epsilon":
        raise UserError(f"--v_parameterization: {options.model_to_load} says that it predicts noise; leave it out")
    return found.prediction_type or asked


if __name__ == "__main__":
    sys.exit(main())
