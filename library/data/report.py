"""What resolved data sets hold, for the plan that a user reads before a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from library.data.captions import add_prefix_and_suffix
from library.data.plan import batches_per_epoch, bucket_visits
from library.data.records import ResolvedDataset, Size
from library.log import some_of

TokenCounter = Callable[[list[str]], list[int]]

_HARD_CROP = 0.2  # share of the scaled image that is cut away
_UPSCALED = 1.01  # enlargement that rounding to whole pixels does not explain


@dataclass(frozen=True, slots=True)
class BucketCount:
    """A training size, its images, and its visits in the first epoch."""

    size: Size
    images: int
    visits: int


@dataclass(frozen=True, slots=True)
class SubsetReport:
    """One subset: images found, visits of each per epoch, images without a caption file and with an empty one, folder
    of the conditioning pictures, and where the masks of the loss come from.
    """

    name: str
    images: int
    repeats: int
    is_reg: bool
    class_tokens: str | None
    without_caption_file: int
    empty_captions: int
    conditioning_dir: str | None = None
    masks: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """What one data set holds. The pairs name an image and say by how much.

    ``upscaled``: enlargement of the sides; ``cropped``: share of the scaled image cut away; ``truncated``: tokens of
    the caption; ``left_out``: reason.
    """

    batch_size: int
    resolution: Size | None
    subsets: tuple[SubsetReport, ...]
    buckets: tuple[BucketCount, ...]
    mean_ar_error: float
    batches: int
    upscaled: tuple[tuple[str, float], ...]
    cropped: tuple[tuple[str, float], ...]
    truncated: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]
    max_tokens: int

    def lines(self) -> list[str]:
        """The report in words, for the log."""
        size = f"{self.resolution[0]}x{self.resolution[1]}" if self.resolution is not None else "sizes of the metadata"
        lines = [f"resolution {size}, batch size {self.batch_size}, {self.batches} batches per epoch"]
        for subset in self.subsets:
            kind = " (regularisation)" if subset.is_reg else ""
            lines.append(f"  {subset.name}{kind}: {subset.images} images x {subset.repeats} repeats{_note(subset)}")
        for bucket in self.buckets:
            width, height = bucket.size
            lines.append(f"  bucket {width}x{height}: {bucket.images} images, {bucket.visits} visits")
        lines.append(f"  mean difference of aspect ratios: {self.mean_ar_error:.4f}")
        lines += _named("images enlarged", [f"{name} x{factor:.2f}" for name, factor in self.upscaled])
        lines += _named("images cropped by over 20 %", [f"{name} {share:.0%}" for name, share in self.cropped])
        lines += _named(
            f"captions cut at {self.max_tokens} tokens", [f"{name} ({count})" for name, count in self.truncated]
        )
        lines += _named("files left out", [f"{name} ({reason})" for name, reason in self.left_out])
        return lines


def describe(
    datasets: Sequence[ResolvedDataset],
    count_tokens: TokenCounter | None = None,
    max_tokens: int = 75,
    processes: int = 1,
) -> tuple[DatasetReport, ...]:
    """What the data sets hold and what will be done to the images.

    ``count_tokens`` gives the tokens of each caption, without begin and end marks; captions over ``max_tokens`` are
    then listed.
    """
    return tuple(_describe_one(dataset, count_tokens, max_tokens, processes) for dataset in datasets)


def _describe_one(
    dataset: ResolvedDataset, count_tokens: TokenCounter | None, max_tokens: int, processes: int
) -> DatasetReport:
    spec = dataset.spec
    pairs = list(zip(dataset.records, dataset.fits, strict=True))
    enlarged = ((record.path, fit.enlargement(record.size)) for record, fit in pairs)
    cut = ((record.path, fit.cut_share) for record, fit in pairs)
    return DatasetReport(
        batch_size=spec.batch_size,
        resolution=spec.buckets.resolution if spec.buckets is not None else None,
        subsets=tuple(_describe_subset(dataset, index) for index in range(len(spec.subsets))),
        buckets=_bucket_counts(dataset),
        mean_ar_error=dataset.mean_ar_error,
        batches=batches_per_epoch([dataset], processes),
        upscaled=_worst((name, factor) for name, factor in enlarged if factor > _UPSCALED),
        cropped=_worst((name, share) for name, share in cut if share > _HARD_CROP),
        truncated=_truncated(dataset, count_tokens, max_tokens) if count_tokens is not None else (),
        left_out=tuple((problem.path, problem.reason) for problem in dataset.problems),
        max_tokens=max_tokens,
    )


def _describe_subset(dataset: ResolvedDataset, index: int) -> SubsetReport:
    subset = dataset.spec.subsets[index]
    records = dataset.records_of(index)
    return SubsetReport(
        name=subset.name,
        images=len(records),
        repeats=subset.num_repeats,
        is_reg=subset.is_reg,
        class_tokens=subset.class_tokens,
        without_caption_file=sum(not record.has_caption for record in records),
        empty_captions=sum(record.has_caption and not record.caption for record in records),
        conditioning_dir=subset.conditioning_data_dir,
        masks="their transparency" if subset.uses_alpha else subset.mask_dir,
    )


def _bucket_counts(dataset: ResolvedDataset) -> tuple[BucketCount, ...]:
    images = Counter(fit.bucket for fit in dataset.fits)
    visited = bucket_visits(dataset, 1)
    return tuple(BucketCount(size, count, visited[size]) for size, count in sorted(images.items()))


def _worst(pairs: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _truncated(dataset: ResolvedDataset, count_tokens: TokenCounter, max_tokens: int) -> tuple[tuple[str, int], ...]:
    captions = [add_prefix_and_suffix(record.caption, dataset.subset_of(record).captions) for record in dataset.records]
    paths = [record.path for record in dataset.records]
    counts = zip(paths, count_tokens(captions), strict=True)
    return tuple((path, count) for path, count in counts if count > max_tokens)


def _note(subset: SubsetReport) -> str:
    notes = [f"after pictures of {subset.conditioning_dir}"] if subset.conditioning_dir is not None else []
    notes += [f"masked by {subset.masks}"] if subset.masks is not None else []
    if subset.without_caption_file and subset.class_tokens is not None:
        notes.append(f"{subset.without_caption_file} take {subset.class_tokens!r} as caption")
    elif subset.without_caption_file:
        notes.append(f"{subset.without_caption_file} without caption")
    if subset.empty_captions:
        notes.append(f"{subset.empty_captions} with an empty caption")
    return f" ({', '.join(notes)})" if notes else ""


def _named(what: str, names: Sequence[str]) -> list[str]:
    return [f"  {len(names)} {what}: {some_of(names)}"] if names else []
