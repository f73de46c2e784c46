"""A run from checked options to saved files: what is done, in which order. Each part is built in
`library.training.setup`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.records import CaptionClock, ResolvedDataset
from library.data.sources import resolve
from library.data.spec_checks import uncacheable_captions, uncacheable_subsets
from library.data.user_dataset import find_class
from library.interrupt import stop_at_once, stop_on_signals
from library.log import UserError
from library.options import CacheOptions, DataOptions, EmbeddingOptions, LoopOptions, SaveOptions, ValidationOptions
from library.options.settings import Settings
from library.training.held_out import hold_out
from library.training.loop import train
from library.training.preflight import check_places
from library.training.script import Script
from library.training.specs import dataset_specs
from library.training.word_captions import require_words, uses_templates, with_templates

if TYPE_CHECKING:
    from library.training.setup import Run

logger = logging.getLogger(__name__)


def run_session(script: Script, settings: Settings) -> int:
    """Do what the options ask for: show the data, print the plan, or train. Returns the exit status."""
    shows_data = settings[DataOptions].debug_dataset
    if not shows_data:
        check_places(settings)  # before the images: finding and measuring many takes long
    datasets, held_out = hold_out(load_datasets(settings), settings[ValidationOptions])
    if shows_data:
        return _show_data(settings, datasets)
    if settings[LoopOptions].dry_run:
        from library.training.dry_run import print_plan

        return print_plan(script, settings, datasets, held_out)
    return _train(script, settings, datasets, held_out)


def load_datasets(settings: Settings) -> tuple[ResolvedDataset, ...]:
    """Find the images and captions of the run; none with a data set class of the user's own."""
    options = settings[DataOptions]
    if options.dataset_class:
        find_class(options.dataset_class)  # no model is read for a name that leads nowhere
        return ()
    words = settings[EmbeddingOptions] if EmbeddingOptions in settings else EmbeddingOptions()
    specs = with_templates(dataset_specs(settings), words)
    obstacles: list[str] = []
    if settings[CacheOptions].cache_latents:
        obstacles += uncacheable_subsets(specs)
    if settings.value_of("cache_text_encoder_outputs"):
        obstacles += uncacheable_captions(specs, _caption_variants(settings))
    if obstacles:
        raise UserError.of(obstacles)
    captionless = options.allow_captionless or uses_templates(words)
    datasets = resolve(specs, options.on_bad_image, options.on_bad_caption, captionless)
    require_words(datasets, words.token_string or ())
    return datasets


def _caption_variants(settings: Settings) -> int:
    return settings.value_of("cache_text_encoder_outputs_variants") or 0


def _show_data(settings: Settings, datasets: Sequence[ResolvedDataset]) -> int:
    from library.data.dataset import TrainImages
    from library.data.debug_sheet import write_debug_sheets
    from library.data.plan import plan_epoch

    folder = Path(settings[SaveOptions].output_dir or "output") / "debug_dataset"
    seed = settings[LoopOptions].seed or 0
    images = TrainImages(datasets, None, seed, settings[DataOptions].on_bad_image, _caption_variants(settings))
    plan = plan_epoch(datasets, seed, 1, 1, 1)
    for path in write_debug_sheets(images, plan, folder, CaptionClock(1, 0, settings[LoopOptions].max_train_steps)):
        logger.info("wrote %s", path)
    return 0


def _train(
    script: Script, settings: Settings, datasets: Sequence[ResolvedDataset], held_out: Sequence[ResolvedDataset]
) -> int:
    from library.data.dataset import BadImage
    from library.training.machine import process_count
    from library.training.setup import build_run

    with stop_on_signals() as stop:
        with stop_at_once():  # nothing is learned yet, and caches on the disk keep what they have
            run = build_run(script, settings, datasets, held_out, stop)
        with run.bar:
            if run.validator:
                run.validator.at_start(run.clock)
            run.previewer.at_start(run.clock)
            try:
                train(run.job)
            except BadImage:
                if run.clock.step and process_count() == 1:  # other processes would not join in the saving
                    _save_stopped(run)
                raise
            if run.validator and run.clock.is_finished:
                run.validator.at_end(run.clock)
        path = run.output.saver.at_end(run.clock) if run.clock.is_finished else _save_stopped(run)
        run.output.finish(path)
        if run.clock.is_finished:  # last of all: drawing takes long, and who ends the program meanwhile misses nothing
            run.previewer.at_end(run.clock)
        run.trackers.finish()
    return 0


def _save_stopped(run: Run) -> Path:
    """Model and state of a run that ends before its time."""
    path = run.output.saver.at_stop(run.clock)
    state = run.output.saver.state_beside(path)
    logger.info("stopped at step %d; go on with --resume %s", run.clock.step, state)
    return path
