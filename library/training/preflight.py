"""What is checked before any slow work: places to write to, files to read, names that have to be found."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from library.data.records import ResolvedDataset
from library.families.base import ModelFamily
from library.log import UserError, first_line
from library.options import (
    ConditioningOptions,
    EmaOptions,
    EmbeddingOptions,
    LogOptions,
    LoopOptions,
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
)
from library.options.settings import Settings

logger = logging.getLogger(__name__)


def check_places(settings: Settings) -> None:
    """Raise one UserError with everything that would stop the run later."""
    problems = [
        *_folder_problems("output_dir", settings[SaveOptions].output_dir),
        *_folder_problems("logging_dir", settings[LogOptions].logging_dir),
        *_file_problems(settings),
    ]
    for check in (_check_network, _check_words, _check_prompts, _check_optimizer):
        problems += _problems_of(check, settings)
    if problems:
        raise UserError.of(problems)


def _problems_of(check: Callable[[Settings], None], settings: Settings) -> list[str]:
    try:
        check(settings)
    except UserError as error:
        return [str(error)]
    return []


def _folder_problems(option: str, name: str | None) -> list[str]:
    if not name:
        return ["--output_dir is missing: say where the trained model goes"] if option == "output_dir" else []
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
    except OSError as error:
        return [f"--{option} {name}: cannot write there ({error.strerror or error}); choose another folder"]
    return []


def _file_problems(settings: Settings) -> list[str]:
    named = [*_weight_files(settings), ("sample_prompts", settings[SampleOptions].sample_prompts)]
    problems = [f"--{name} {file}: there is no such file" for name, file in named if file and not os.path.isfile(file)]
    net = settings.value_of("controlnet_model_name_or_path")
    if net and not Path(net).expanduser().exists():
        problems.append(f"--controlnet_model_name_or_path {net}: there is no such file or folder")
    return problems


def _weight_files(settings: Settings) -> list[tuple[str, str]]:
    if EmbeddingOptions in settings:
        return [("weights", file) for file in settings[EmbeddingOptions].weights or ()]
    weights, merged = settings.value_of("network_weights"), settings.value_of("base_weights") or ()
    return [*([("network_weights", weights)] if weights else []), *(("base_weights", file) for file in merged)]


def _check_network(settings: Settings) -> None:
    """The network module can be imported, and the files for it are whole (by their headers)."""
    from library.checkpoint.io import is_safetensors, read_header
    from library.plugin import load_network_module

    if NetworkOptions in settings:
        load_network_module(str(settings[NetworkOptions].network_module))
    for option, file in _weight_files(settings):
        try:
            if os.path.isfile(file) and is_safetensors(file):
                read_header(file)
        except UserError as error:
            raise UserError(f"--{option}: {error}") from error


def _check_words(settings: Settings) -> None:
    """New words are new; how many vectors they have shows only later."""
    from library.families import family_for
    from library.text.embedding_files import Embedding, require_own_words

    if EmbeddingOptions in settings:
        tokenizers = family_for(settings[ModelOptions], settings.script.family).tokenizers
        words = settings[EmbeddingOptions].token_string or []
        no_vectors = (torch.empty(1, 0),)
        require_own_words(
            tokenizers, [Embedding(word, "--token_string", no_vectors) for word in words], "choose another word"
        )


def _check_prompts(settings: Settings) -> None:
    from library.generation.samplers import check_sampler
    from library.training.preview import first_prompts

    options = settings[SampleOptions]
    name = options.sample_prompts
    if not name or not os.path.isfile(name):
        return
    prompts = first_prompts(options)
    if not prompts:
        logger.warning("--sample_prompts %s: there is no prompt in it, so there are no previews", name)
    for prompt in prompts:
        try:
            check_sampler(prompt.sample_sampler or options.sample_sampler, prompt.sample_steps)
        except UserError as error:
            raise UserError(f"--sample_prompts {name}: {error}") from error
    guided = [prompt.controlnet_image for prompt in prompts if prompt.controlnet_image is not None]
    if ConditioningOptions not in settings:
        if guided:
            logger.warning("--sample_prompts %s: --cn has no effect: no ControlNet is trained here", name)
        return
    missing = [file for file in guided if not os.path.isfile(file)]
    if missing:
        raise UserError.of([f"--sample_prompts {name}: --cn {file}: there is no such file" for file in missing])
    if len(guided) < len(prompts):
        count = len(prompts) - len(guided)
        logger.warning(
            "--sample_prompts %s: %d prompts have no picture (--cn) and are drawn without the net", name, count
        )


def _check_optimizer(settings: Settings) -> None:
    """Optimizer and schedule can be made, shown on a weight of no importance: the model is not read for a typo."""
    from library.device import choose_device
    from library.training.average import make_average
    from library.training.fused import refuse_joint_optimizer
    from library.training.lr import create_schedule
    from library.training.optimizers import create_optimizer, is_schedule_free
    from library.training.rates import table

    device, options = choose_device(), settings[OptimizerOptions]
    with _silent():
        weight = torch.nn.Parameter(torch.zeros(2, 2, device=device))
        optimizer, _ = create_optimizer(options, [weight], device)
        _try_step(optimizer, weight)
        make_average(settings[EmaOptions], [weight], optimizer_averages=is_schedule_free(optimizer))
        if settings[LoopOptions].max_train_epochs is None:  # else the length is not known yet
            table(settings[ScheduleOptions], optimizer, settings[LoopOptions].max_train_steps)
        create_schedule(settings[ScheduleOptions], optimizer, settings[LoopOptions].max_train_steps)
        if settings.value_of("fused_backward_pass"):
            name = type(optimizer).__name__
            refuse_joint_optimizer(lambda groups: create_optimizer(options, groups, device)[0], name, device)


def _try_step(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)  # DAdaptSGD divides by its norm
    try:
        optimizer.step()
    except Exception as error:  # arguments that the class takes, and then cannot work with, show here in many ways
        name = type(optimizer).__name__
        raise UserError(
            f"--optimizer_type {name}: no step can be made with gradients alone and its --optimizer_args"
            f" ({first_line(error)})"
        ) from error


@contextmanager
def _silent() -> Generator[None]:
    """No warnings inside: they come when the real thing is made."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(former)


def check_bucket_steps(family: ModelFamily, datasets: Sequence[ResolvedDataset]) -> None:
    """Refuse bucket sizes that the family's U-Net cannot halve often enough."""
    rules = [dataset.spec.buckets for dataset in datasets if dataset.spec.buckets]
    steps = {rule.bucket_reso_steps for rule in rules if rule.enable_bucket}
    wrong = sorted(step for step in steps if step % family.bucket_step)
    if wrong:
        listed = ", ".join(map(str, wrong))
        raise UserError(
            f"bucket_reso_steps {listed}: must be a multiple of {family.bucket_step} for this kind of model"
        )


def free_bytes(output_dir: str) -> int:
    """Free space where the output goes; the folder itself need not exist yet."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
