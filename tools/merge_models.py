"""Merge checkpoint files of one family: each tensor is the weighted mean of the models'.

``python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output c.safetensors``
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.log import UserError, progress
from library.options.model_tools import MergeModelsOptions
from library.options.scripts import MERGE_MODELS
from library.options.settings import Settings

if TYPE_CHECKING:
    import torch

    from library.models.merge import MergeInput
    from library.models.spec import ArchitectureSpec

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(MERGE_MODELS, merge, argv)


def merge(settings: Settings) -> int:
    """Write the mean of the models of the options; returns the exit status. Raises UserError."""
    from library.checkpoint.io import save_safetensors
    from library.device import device_named
    from library.families.files import watched
    from library.models.load import check_written
    from library.models.merge import described, open_inputs, plan_merge

    options = settings[MergeModelsOptions]
    paths = [Path(model) for model in options.models or []]
    ratios, target = _ratios(options, len(paths)), _target(options, paths)
    with ExitStack() as stack:
        inputs = open_inputs(stack, paths, ratios)
        plan = plan_merge(inputs, options.unet_only, _dtype(options.precision), device_named(options.device))
        if plan.skipped:
            shown = described(plan.skipped, len(plan.skipped) if options.show_skipped else 5)
            logger.warning("%d tensors that the first model lacks are left out: %s", len(plan.skipped), shown)
        if plan.filled:
            logger.warning("%d tensors are the first model's where another lacks them", len(plan.filled))
        metadata = _metadata(inputs, plan.spec, target)
        with progress(len(plan.tensors), "merging") as bar:
            save_safetensors(target, watched(plan.tensors, bar.advance), metadata, _dtype(options.saving_precision))
    for line in check_written(target, plan.spec):
        logger.info("%s", line)
    return 0


def _metadata(inputs: Sequence[MergeInput], spec: ArchitectureSpec, target: Path) -> dict[str, str]:
    """The result is of the first model's kind, and names all that went into it."""
    from library.checkpoint.modelspec import title_of
    from library.families.files import modelspec_of
    from library.models.infer import prediction_of_file

    first = inputs[0].file
    prediction = prediction_of_file(first.infos, first.metadata)
    titles = [title_of(term.file.metadata, term.file.path.stem) for term in inputs]
    return modelspec_of(spec.family, "", target.stem, prediction, titles).as_metadata()


def _dtype(name: str) -> torch.dtype:
    from library.device import save_dtype

    dtype = save_dtype(name)
    assert dtype is not None
    return dtype


def _ratios(options: MergeModelsOptions, count: int) -> list[float]:
    if options.ratios is None:
        return [1.0 / count] * count
    if len(options.ratios) != count:
        raise UserError(f"--ratios has {len(options.ratios)} numbers for {count} files in --models")
    return list(options.ratios)


def _target(options: MergeModelsOptions, paths: Sequence[Path]) -> Path:
    target = Path(options.output or "")
    if target.suffix.lower() != ".safetensors":
        target = target.with_name(f"{target.name}.safetensors")
    if target.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"--output {target} is one of --models; choose another name")
    return target


if __name__ == "__main__":
    sys.exit(main())
