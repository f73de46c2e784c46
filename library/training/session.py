"""A run from checked options to saved files: what is done, in which order. Each part is built in
`library.training.setup`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from library.data.records import CaptionClock, ResolvedDataset
from library.data.sources import resolve
from library.data.spec import load_dataset_specs
from library.data.spec_checks import uncacheable_subsets
from library.log import UserError
from library.options import CacheOptions, DataOptions, LoopOptions, SaveOptions
from library.options.settings import Settings
from library.training.interrupt import stop_on_signals
from library.training.loop import train
from library.training.preflight import check_places
from library.training.script import Script

logger = logging.getLogger(__name__)


def run_session(script: Script, settings: Settings) -> int:
    """Do what the options ask for: show the data, print the plan, or train. Returns the exit status."""
    datasets = load_datasets(settings[DataOptions], settings[CacheOptions])
    if settings[DataOptions].debug_dataset:
        return _show_data(settings, datasets)
    if settings[LoopOptions].dry_run:
        from library.training.dry_run import print_plan

        return print_plan(script, settings, datasets)
    check_places(settings)
    return _train(script, settings, datasets)


def load_datasets(options: DataOptions, cache: CacheOptions) -> tuple[ResolvedDataset, ...]:
    """Find the images and captions of the run; none with a data set class of the user's own."""
    if options.dataset_class:
        return ()
    specs = load_dataset_specs(options)
    if cache.cache_latents and (obstacles := uncacheable_subsets(specs)):
        raise UserError.of(obstacles)
    return resolve(specs, options.on_bad_image, options.on_bad_caption, options.allow_captionless)


def _show_data(settings: Settings, datasets: Sequence[ResolvedDataset]) -> int:
    from library.data.dataset import TrainImages
    from library.data.debug_sheet import write_debug_sheets
    from library.data.plan import plan_epoch

    folder = Path(settings[SaveOptions].output_dir or "output") / "debug_dataset"
    seed = settings[LoopOptions].seed or 0
    images = TrainImages(datasets, None, seed, settings[DataOptions].on_bad_image)
    plan = plan_epoch(datasets, seed, 1, 1, 1)
    for path in write_debug_sheets(images, plan, folder, CaptionClock(1, 0, settings[LoopOptions].max_train_steps)):
        logger.info("wrote %s", path)
    return 0


def _train(script: Script, settings: Settings, datasets: Sequence[ResolvedDataset]) -> int:
    from library.training.setup import build_run

    with stop_on_signals() as stop:
        run = build_run(script, settings, datasets, stop)
        saver, clock = run.output.saver, run.clock
        with run.bar:
            run.previewer.at_start(clock)
            train(run.job)
        if clock.is_finished:
            path = saver.at_end(clock)
        else:
            path = saver.at_stop(clock)
            logger.info("stopped at step %d; go on with --resume %s", clock.step, path.with_name(path.stem + "-state"))
        run.output.finish(path)
        run.trackers.finish()
    return 0
