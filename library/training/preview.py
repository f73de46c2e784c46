"""Preview pictures while training: when, which, where. A preview that fails is a warning, never the run's end.

Prompt i is drawn by process i mod P. Modules are in eval mode meanwhile; every module's mode and all random states are
as before afterwards.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from library.generation.engine import Engine
from library.generation.prompts import NoPrompt, PromptSpec, load_prompts
from library.generation.sample import draw_sample
from library.log import UserError
from library.training.clock import Clock, is_due
from library.training.preview_files import START, PreviewFiles

logger = logging.getLogger(__name__)


class PreviewOptions(Protocol):
    """The options of the same names."""

    @property
    def sample_prompts(self) -> str | None: ...
    @property
    def sample_at_first(self) -> bool: ...
    @property
    def sample_every_n_steps(self) -> int | None: ...
    @property
    def sample_every_n_epochs(self) -> int | None: ...


class Previewer:
    """Draws the prompts of ``--sample_prompts`` when they are due. An effect of the loop."""

    def __init__(
        self,
        options: PreviewOptions,
        engine: Engine,
        *,
        sampler: str,
        output_dir: str | Path,
        output_name: str | None,
        trained: Sequence[nn.Module] = (),
        rank: int = 0,
        processes: int = 1,
        trackers: Sequence[Any] = (),
        barrier: Callable[[], None] | None = None,
        in_use: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """``engine`` draws with the model in training, prompts that name no sampler with ``sampler``. ``trained`` are
        further modules to put in eval mode (the network); ``trackers`` are accelerate's, if any. ``in_use`` puts the
        weights in place that would be saved, for as long as pictures are drawn.

        The prompt file is read here, so that its mistakes show before training, and again at each preview, so that it
        may be edited meanwhile. Raises UserError.
        """
        self._options = options
        self._engine = engine
        self._sampler = sampler
        self._files = PreviewFiles(Path(output_dir), output_name)
        self._modules = (*engine.parts.modules(), *trained)
        self._rank, self._processes = rank, processes
        self._trackers = trackers
        self._barrier = barrier
        self._in_use = in_use
        self._prompts = first_prompts(options)

    def at_start(self, clock: Clock) -> None:
        """Before the first step; a resumed run had it already."""
        if clock.step:
            self._files.include_earlier()
        elif self._options.sample_at_first:
            self._draw_all(START, clock)

    def after_step(self, clock: Clock, report: object = None) -> None:
        """After each optimizer step but the last, see ``at_end``; what the step reports does not matter here."""
        by_step = not (self._options.sample_every_n_epochs or clock.is_finished)
        if by_step and is_due(clock.step, self._options.sample_every_n_steps):
            self._draw_all(f"{clock.step:06d}", clock)

    def after_epoch(self, clock: Clock) -> None:
        """At the end of each epoch but the last, while ``clock.epoch`` still names it."""
        if not clock.is_finished and is_due(clock.epoch, self._options.sample_every_n_epochs):
            self._draw_all(f"e{clock.epoch:06d}", clock)

    def at_end(self, clock: Clock) -> None:
        """When the training is finished and its result is saved, so that no preview can cost the result."""
        by_epoch = bool(self._options.sample_every_n_epochs)
        self._draw_all(f"e{clock.epoch:06d}" if by_epoch else f"{clock.step:06d}", clock)

    def _draw_all(self, moment: str, clock: Clock) -> None:
        if not self._prompts:
            return
        prompts = self._current_prompts()
        device = self._engine.settings.device
        with evaluating(self._modules), untouched_random_states(device), self._in_use():
            self._engine.forget_texts()  # the text encoders may have learned
            for index in range(self._rank, len(prompts), self._processes):
                self._draw(index, prompts[index], moment)
        if self._barrier is not None:
            self._barrier()
        if self._rank == 0:
            self._show(prompts, moment, clock.step)

    def _current_prompts(self) -> Sequence[PromptSpec]:
        try:
            self._prompts = load_prompts(str(self._options.sample_prompts))
        except UserError as error:
            logger.warning("the prompt file has changed and cannot be used, the earlier prompts are drawn: %s", error)
        return self._prompts

    def _draw(self, index: int, prompt: PromptSpec, moment: str) -> None:
        try:
            picture = draw_sample(self._engine, prompt, self._sampler)
            file = self._files.write(picture, index, prompt.seed, moment)
            logger.info("preview: %s", file)
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # whatever goes wrong in a preview must not end the training
            logger.warning("preview %d (%s) failed: %s: %s", index, moment, type(error).__name__, error)
            logger.debug("preview %d", index, exc_info=True)

    def _show(self, prompts: Sequence[PromptSpec], moment: str, step: int) -> None:
        """Put the pictures of all processes on the sheet, and give them to the trackers."""
        try:
            logger.info("all previews so far: %s", self._files.write_sheet(prompts))
        except Exception as error:  # as with single previews: also a Pillow without fonts must not end the training
            logger.warning("the sheet of previews could not be written: %s", error)
        if self._trackers:
            self._log_images(self._files.newest().get(moment, {}), step)

    def _log_images(self, files: dict[int, Path], step: int) -> None:
        import numpy as np
        from PIL import Image as PilImage

        for index, file in sorted(files.items()):
            pixels_1HWC = np.asarray(PilImage.open(file).convert("RGB"))[None]
            for tracker in self._trackers:
                extra = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"sample_{index}": pixels_1HWC}, step=step, **extra)


def first_prompts(options: PreviewOptions) -> Sequence[PromptSpec]:
    """The prompts of the file. None without a file, and none of one that holds none (graphical front ends always write
    it) if no option asks for previews at some time. Raises UserError.
    """
    if not options.sample_prompts:
        return ()
    try:
        return load_prompts(options.sample_prompts)
    except NoPrompt:
        if options.sample_at_first or options.sample_every_n_steps or options.sample_every_n_epochs:
            raise
        return ()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Generator[None]:
    """Eval mode for modules and all their parts; each part's own mode is restored."""
    parts = {part: part.training for module in modules for part in module.modules()}
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, was_training in parts.items():
            part.training = was_training


@contextmanager
def untouched_random_states(device: torch.device) -> Generator[None]:
    """Torch's, Python's and NumPy's global generators are as before afterwards."""
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    on_device = device.type in ("cuda", "xpu")
    index = device.index or 0
    try:
        with torch.random.fork_rng([index] if on_device else [], device_type=device.type if on_device else "cuda"):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
