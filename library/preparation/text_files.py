"""One text file beside each image, from a model that looks at batches of them: the part that all such tools share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from library.checkpoint.io import atomic_write_text
from library.data.images import Pixels, UnreadableImage, read_image
from library.data.loader import prefetch
from library.log import progress
from library.options.preparation import BlipCaptionOptions, GitCaptionOptions, TagOptions
from library.preparation.files import find_images, with_extension
from library.preparation.outcome import Outcome

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")
TextToolOptions = BlipCaptionOptions | GitCaptionOptions | TagOptions
_WORKERS = 4


@dataclass(frozen=True, slots=True)
class TextTask:
    """Which images get a text file, and how they are read. ``workers`` None takes the usual number of threads."""

    folder: str
    recursive: bool
    extension: str
    batch_size: int
    workers: int | None
    skip_existing: bool
    debug: bool

    @classmethod
    def of(cls, options: TextToolOptions) -> TextTask:
        """What the options of such a tool say."""
        return cls(
            folder=str(options.train_data_dir),
            recursive=options.recursive,
            extension=options.caption_extension,
            batch_size=options.batch_size,
            workers=options.max_data_loader_n_workers,
            skip_existing=options.skip_existing,
            debug=options.debug,
        )


@dataclass(frozen=True, slots=True)
class _Failed:
    reason: str


def images_to_describe(task: TextTask) -> tuple[list[Path], Outcome]:
    """The images that get a text, and the count of those that have one already. Raises UserError."""
    images = find_images(task.folder, task.recursive)
    wanted = [path for path in images if not (task.skip_existing and with_extension(path, task.extension).exists())]
    return wanted, Outcome(skipped=len(images) - len(wanted))


def write_texts(
    task: TextTask,
    images: Sequence[Path],
    outcome: Outcome,
    load: Callable[[Path], Loaded],
    describe: Callable[[Sequence[Path], Sequence[Loaded]], Sequence[str]],
) -> Outcome:
    """Write the text that ``describe`` gives for each image, batch by batch; returns ``outcome`` with the counts.

    ``load`` runs in threads ahead; it may raise `UnreadableImage`, which leaves that image out and is named.
    """

    def try_load(path: Path) -> tuple[Path, Loaded | _Failed]:
        try:
            return path, load(path)
        except UnreadableImage as error:
            return path, _Failed(error.reason)

    workers = _WORKERS if task.workers is None else task.workers
    loaded = prefetch(images, try_load, workers, ahead=max(2 * workers, 2 * task.batch_size))
    with closing(loaded) as source, progress(len(images), "images") as bar:
        for batch in _batches(source, task.batch_size, outcome):
            paths, inputs = [path for path, _ in batch], [one for _, one in batch]
            for path, text in zip(paths, describe(paths, inputs), strict=True):
                atomic_write_text(with_extension(path, task.extension), text + "\n", durable=False)
                outcome.done += 1
                if task.debug:
                    logger.info("%s: %s", path, text)
            bar.advance(len(batch), images=len(batch))
    return outcome


class Captioner(Protocol):
    """A model that describes pictures."""

    def prepare(self, pixels_HWC: Pixels) -> Tensor:
        """A picture as the model wants it, CHW."""
        ...

    def captions(self, names: Sequence[str], pictures: Sequence[Tensor]) -> list[str]:
        """The captions of prepared pictures; ``names`` are those of their files."""
        ...


def caption_images(options: BlipCaptionOptions | GitCaptionOptions, load: Callable[[], Captioner]) -> Outcome:
    """Write a caption file beside each image; the model is loaded only if there is an image to describe.

    Raises UserError.
    """
    task = TextTask.of(options)
    images, outcome = images_to_describe(task)
    if not images:
        return outcome
    captioner = load()

    def describe(paths: Sequence[Path], pictures: Sequence[Tensor]) -> list[str]:
        return captioner.captions([path.name for path in paths], pictures)

    return write_texts(task, images, outcome, lambda path: captioner.prepare(read_image(str(path))), describe)


def _batches(
    source: Iterable[tuple[Path, Loaded | _Failed]], size: int, outcome: Outcome
) -> Iterator[list[tuple[Path, Loaded]]]:
    batch: list[tuple[Path, Loaded]] = []
    for path, one in source:
        if isinstance(one, _Failed):
            outcome.fail(str(path), one.reason)
            continue
        batch.append((path, one))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
