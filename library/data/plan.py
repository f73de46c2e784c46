"""The order of an epoch: which samples are taken together, in which step. A pure function of (seed, epoch,
arrangement).

Every training image is visited exactly ``repeats`` times in an epoch. Regularisation images are dealt out so that
each epoch visits as many of them as training samples; the dealing goes on in the next epoch where it stopped, so all
of them are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from library.data.bulk import many_objects
from library.data.records import MicroBatch, ResolvedDataset, Sample, Size, StepPlan
from library.rng import stream


def plan_epoch(
    datasets: Sequence[ResolvedDataset], seed: int, epoch: int, processes: int, accumulation: int
) -> tuple[StepPlan, ...]:
    """The optimizer steps of epoch ``epoch`` (from 1).

    Each bucket's samples are shuffled and cut into chunks of batch size times ``processes``; the chunks of all
    buckets and data sets are merged in random order, each bucket keeping its own. ``accumulation`` consecutive chunks
    make a step; the last step may have fewer, and the last chunk of a bucket fewer samples.
    """
    with many_objects():
        merged = _merge(_chunks(datasets, seed, epoch, processes), seed, epoch)
        return tuple(StepPlan(tuple(merged[i : i + accumulation])) for i in range(0, len(merged), accumulation))


def batches_per_epoch(datasets: Sequence[ResolvedDataset], processes: int, epoch: int = 1) -> int:
    """Micro batches (over all processes) of an epoch: what `plan_epoch` makes, without making it."""
    total = 0
    for dataset in datasets:
        chunk_size = dataset.spec.batch_size * processes
        total += sum(-(-count // chunk_size) for count in bucket_visits(dataset, epoch).values())
    return total


def steps_per_epoch(datasets: Sequence[ResolvedDataset], processes: int, accumulation: int, epoch: int = 1) -> int:
    """Optimizer steps of an epoch. With regularisation images it can differ a little from epoch to epoch."""
    return -(-batches_per_epoch(datasets, processes, epoch) // accumulation)


def steps_of_epochs(datasets: Sequence[ResolvedDataset], processes: int, accumulation: int, epochs: int) -> int:
    """Optimizer steps of the first ``epochs`` epochs."""
    steps: dict[tuple[int, ...], int] = {}
    total = 0
    for epoch in range(1, epochs + 1):
        # The number depends on the epoch only through the regularisation images at which the dealing starts.
        phase = tuple(_deal_start(dataset, epoch) for dataset in datasets)
        if phase not in steps:
            steps[phase] = steps_per_epoch(datasets, processes, accumulation, epoch)
        total += steps[phase]
    return total


def training_visits(dataset: ResolvedDataset) -> int:
    """Visits of training images in an epoch: the sum of their repeats."""
    return sum(record.repeats for record in dataset.records if not record.is_reg)


def regularisation_visits(dataset: ResolvedDataset, epoch: int) -> Iterator[int]:
    """The indices of the regularisation records that an epoch visits, as many as `training_visits`.

    All images are dealt in rounds, image by image, each in as many rounds as it has repeats, and then from the start
    again.
    """
    deck = _reg_deck(dataset)
    start = _deal_start(dataset, epoch)
    for place in range(start, start + training_visits(dataset) if deck else start):
        yield deck[place % len(deck)]


def _deal_start(dataset: ResolvedDataset, epoch: int) -> int:
    """The place in the deck at which an epoch's dealing starts; 0 without regularisation images."""
    deck_size = sum(record.repeats for record in dataset.records if record.is_reg)
    return (epoch - 1) * training_visits(dataset) % deck_size if deck_size else 0


def _reg_deck(dataset: ResolvedDataset) -> list[int]:
    reg = [(index, record.repeats) for index, record in enumerate(dataset.records) if record.is_reg]
    rounds = max((repeats for _, repeats in reg), default=0)
    return [index for turn in range(rounds) for index, repeats in reg if repeats > turn]


def visits(dataset: ResolvedDataset, epoch: int) -> Iterator[int]:
    """The record index of every visit of the epoch, unshuffled; the visits of an image come in order."""
    for index, record in enumerate(dataset.records):
        if not record.is_reg:
            for _ in range(record.repeats):
                yield index
    yield from regularisation_visits(dataset, epoch)


def bucket_visits(dataset: ResolvedDataset, epoch: int) -> Counter[Size]:
    """How many visits of the epoch each training size gets."""
    return Counter(dataset.fits[index].bucket for index in visits(dataset, epoch))


def _chunks(datasets: Sequence[ResolvedDataset], seed: int, epoch: int, processes: int) -> list[list[MicroBatch]]:
    """The chunks of each bucket of each data set, in the order in which the epoch takes them."""
    chunks: list[list[MicroBatch]] = []
    for index, dataset in enumerate(datasets):
        for bucket, samples in _samples_by_bucket(dataset, epoch).items():
            stream(seed, "bucket order", epoch, index, *bucket).shuffle(samples)
            chunk_size = dataset.spec.batch_size * processes
            cuts = range(0, len(samples), chunk_size)
            chunks.append([MicroBatch(index, tuple(samples[cut : cut + chunk_size])) for cut in cuts])
    return chunks


def _samples_by_bucket(dataset: ResolvedDataset, epoch: int) -> dict[Size, list[Sample]]:
    seen = [0] * len(dataset.records)
    groups: dict[Size, list[Sample]] = {}
    for index in visits(dataset, epoch):
        groups.setdefault(dataset.fits[index].bucket, []).append(Sample(index, seen[index]))
        seen[index] += 1
    return dict(sorted(groups.items()))


def _merge(lists: Sequence[list[MicroBatch]], seed: int, epoch: int) -> list[MicroBatch]:
    turns = [index for index, items in enumerate(lists) for _ in items]
    stream(seed, "merge order", epoch).shuffle(turns)
    iterators = [iter(items) for items in lists]
    return [next(iterators[turn]) for turn in turns]
