"""One text file beside each image, from a model that looks at batches of them: the part that all such tools share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from library.checkpoint.io import atomic_write_text
from library.data.images import Pixels, UnreadableImage, read_image
from library.data.loader import prefetch
from library.log import progress, some_of
from library.options.preparation import TextToolOptions
from library.preparation.files import find_images, with_extension
from library.preparation.outcome import Outcome

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")
_WORKERS = 4


@dataclass(frozen=True, slots=True)
class _Failed:
    reason: str


def images_to_describe(options: TextToolOptions) -> tuple[list[Path], Outcome]:
    """The images that get a text, and the count of those that have one already. Raises UserError."""
    images = find_images(str(options.train_data_dir), options.recursive)
    counts = Counter(path.with_suffix("") for path in images)
    shared = [path.name for path in images if counts[path.with_suffix("")] > 1]
    if shared:
        logger.warning("images that differ only in their extension share a text, that of the last: %s", some_of(shared))
    suffix = options.caption_extension
    wanted = [path for path in images if not (options.skip_existing and with_extension(path, suffix).exists())]
    return wanted, Outcome(skipped=len(images) - len(wanted))


def write_texts(
    options: TextToolOptions,
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

    workers = _WORKERS if options.max_data_loader_n_workers is None else options.max_data_loader_n_workers
    loaded = prefetch(images, try_load, workers, ahead=max(2 * workers, 2 * options.batch_size))
    with closing(loaded) as source, progress(len(images), "images") as bar:
        for batch in _batches(source, options.batch_size, outcome):
            paths, inputs = [path for path, _ in batch], [one for _, one in batch]
            for path, text in zip(paths, describe(paths, inputs), strict=True):
                atomic_write_text(with_extension(path, options.caption_extension), text + "\n", durable=False)
                outcome.done += 1
                if options.debug:
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


def caption_images(options: TextToolOptions, load: Callable[[], Captioner]) -> Outcome:
    """Write a caption file beside each image; the model is loaded only if there is an image to describe.

    Raises UserError.
    """
    images, outcome = images_to_describe(options)
    if not images:
        return outcome
    captioner = load()

    def describe(paths: Sequence[Path], pictures: Sequence[Tensor]) -> list[str]:
        return captioner.captions([path.name for path in paths], pictures)

    return write_texts(options, images, outcome, lambda path: captioner.prepare(read_image(str(path))), describe)


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
