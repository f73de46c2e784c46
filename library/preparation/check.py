"""What is wrong with a data set, or at least worth a look. Facts in, findings out; nothing is written here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.data.records import Fit, ImageRecord, ResolvedDataset, Size
from library.data.report import DatasetReport
from library.preparation.duplicates import groups, near_pairs
from library.preparation.looks import Look

# Kind of finding -> title and what it means, in the order of the report.
KINDS: Mapping[str, tuple[str, str]] = {
    "unreadable": ("Unreadable images", "Training stops at them, or leaves them out with --on_bad_image skip."),
    "caption": ("Unreadable captions", "Save them as UTF-8 text."),
    "unpaired": ("Images without a mask", "Training with masks, or of ControlNets, stops at them or leaves them out."),
    "tiny": ("Tiny images", "Enlarged for training they teach blur."),
    "duplicate": ("Duplicates", "The same pixels more than once: each is a further repeat of that picture."),
    "near_duplicate": ("Near duplicates", "Hardly different: scaled, recompressed, or the next picture of a series."),
    "captionless": ("Images without a caption", "They are trained with the class tokens, or with an empty caption."),
    "empty": ("Empty captions", "The caption file is there, but its first line says nothing."),
    "truncated": ("Captions that are too long", "What is behind the limit is not read; see --max_token_length."),
    "cropped": ("Strongly cropped images", "Over a fifth of the picture is cut away by the bucket."),
    "enlarged": ("Strongly enlarged images", "Scaled to over one and a half times their size."),
    "transparent": ("Transparent images", "What is transparent is trained as white, and with alpha_mask not at all."),
    "huge": ("Large files", "They take long to read in each epoch; latents can be cached, or the files made smaller."),
}
MIN_SIDE_PX = 256
_STRONGLY_ENLARGED = 1.5
_LATENTS = ".npz"
_WITHOUT_RECORD = ("unreadable", "unpaired")


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is worth a line."""

    min_side: int = MIN_SIDE_PX
    max_bytes: int = 20_000_000
    duplicate_distance: int = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one image; ``group`` numbers the duplicates that belong together, the first of which stays."""

    kind: str
    path: str
    detail: str
    group: int | None = None
    stays: bool = False


@dataclass(frozen=True, slots=True)
class BucketLine:
    """One training size: its images, and the mean share that is cut away and mean enlargement of their sides."""

    size: Size
    images: int
    cut_share: float
    enlargement: float


@dataclass(frozen=True)
class CheckReport:
    """All that was found. ``paths``: every image, with the caption file of those that have one."""

    images: int
    findings: tuple[Finding, ...]
    datasets: tuple[DatasetReport, ...]
    buckets: tuple[tuple[BucketLine, ...], ...]
    tags: tuple[tuple[str, int], ...]
    compared: int
    paths: Mapping[str, str | None] = field(default_factory=dict[str, str | None])

    def of_kind(self, kind: str) -> list[Finding]:
        """The findings of one kind, in order."""
        return [finding for finding in self.findings if finding.kind == kind]


def unique_images(datasets: Iterable[ResolvedDataset]) -> dict[str, ImageRecord]:
    """The images of all data sets by path, each once; latents without an image are left out."""
    found: dict[str, ImageRecord] = {}
    for record in (record for dataset in datasets for record in dataset.records):
        if not record.path.endswith(_LATENTS):
            found.setdefault(record.path, record)
    return found


def check(
    datasets: Sequence[ResolvedDataset], reports: Sequence[DatasetReport], looks: Sequence[Look], limits: Limits
) -> CheckReport:
    """Findings of resolved data sets, of their ``describe`` reports and of what was seen of each unique image."""
    images = unique_images(datasets)
    seen = {look.path: look for look in looks if look.problem is None}
    whole = {path: record for path, record in images.items() if path in seen}
    findings = [
        *_unusable(datasets, looks),
        *(_finding_of_size(record, limits) for record in whole.values() if min(record.size) < limits.min_side),
        *_of_captions(images.values(), reports),
        *_of_geometry(reports),
        *(Finding("transparent", path, "") for path in whole if seen[path].is_transparent),
        *(
            Finding("huge", path, f"{seen[path].size_bytes / 1e6:.1f} MB")
            for path in whole
            if seen[path].size_bytes > limits.max_bytes
        ),
    ]
    duplicates, compared = _duplicates(whole, seen, limits.duplicate_distance)
    order = {kind: place for place, kind in enumerate(KINDS)}
    findings = sorted([*findings, *duplicates], key=lambda finding: order[finding.kind])
    bad_paths = {finding.path: None for finding in findings if finding.kind in _WITHOUT_RECORD}
    return CheckReport(
        images=len({**images, **bad_paths}),
        findings=tuple(findings),
        datasets=tuple(reports),
        buckets=tuple(_bucket_lines(dataset) for dataset in datasets),
        tags=_count_tags(datasets),
        compared=compared,
        paths={**bad_paths, **{path: record.caption_path for path, record in images.items()}},
    )


def _unusable(datasets: Sequence[ResolvedDataset], looks: Sequence[Look]) -> Iterator[Finding]:
    known: set[str] = set()
    for problem in (problem for dataset in datasets for problem in dataset.problems):
        if problem.path not in known:
            kind = "unpaired" if problem.lacks_pair else "caption" if problem.is_caption else "unreadable"
            yield Finding(kind, problem.path, problem.reason)
            known.add(problem.path)
    for look in looks:
        if look.problem is not None:
            yield Finding("unreadable", look.path, look.problem)


def _finding_of_size(record: ImageRecord, limits: Limits) -> Finding:
    width, height = record.size
    return Finding("tiny", record.path, f"{width}x{height}; a side is below {limits.min_side}")


def _of_captions(records: Iterable[ImageRecord], reports: Sequence[DatasetReport]) -> Iterator[Finding]:
    for record in records:
        if not record.has_caption and not record.is_reg:
            yield Finding("captionless", record.path, f"trained as {record.caption!r}" if record.caption else "")
        elif not record.caption:
            yield Finding("empty", record.path, "")
    longest: dict[str, tuple[int, int]] = {}
    for report in reports:
        for path, count in report.truncated:
            longest[path] = count, report.max_tokens
    for path, (count, most) in longest.items():
        yield Finding("truncated", path, f"{count} tokens, {count - most} over the limit")


def _of_geometry(reports: Sequence[DatasetReport]) -> Iterator[Finding]:
    for report in reports:
        yield from (Finding("cropped", path, f"{share:.0%} cut away") for path, share in report.cropped)
        yield from (
            Finding("enlarged", path, f"x{factor:.2f}")
            for path, factor in report.upscaled
            if factor > _STRONGLY_ENLARGED
        )


def _duplicates(
    images: Mapping[str, ImageRecord], seen: Mapping[str, Look], distance: int
) -> tuple[list[Finding], int]:
    """Findings of equal pixels, and of near pictures among those that are left; and the comparisons that it took."""
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for path in images:
        by_digest[seen[path].digest].append(path)
    same = [sorted(paths, key=lambda path: _worth(images[path], seen[path])) for paths in by_digest.values()]
    findings = _groups_as_findings("duplicate", [group for group in same if len(group) > 1], images)
    by_hash: dict[int, list[str]] = defaultdict(list)
    for first, *_ in same:
        if (value := seen[first].hash) is not None:
            by_hash[value].append(first)
    hashes = list(by_hash)
    found = near_pairs(hashes, distance)
    connected = groups(len(hashes), found.pairs)
    near = [[path for position in group for path in by_hash[hashes[position]]] for group in connected]
    near = [sorted(group, key=lambda path: _worth(images[path], seen[path])) for group in near if len(group) > 1]
    return findings + _groups_as_findings("near_duplicate", near, images), found.compared


def _worth(record: ImageRecord, look: Look) -> tuple[int, bool, int, str]:
    """A key that sorts the picture to keep to the front: most pixels, a caption, most bytes."""
    return -record.size[0] * record.size[1], not record.has_caption, -look.size_bytes, record.path


def _groups_as_findings(kind: str, found: Sequence[Sequence[str]], images: Mapping[str, ImageRecord]) -> list[Finding]:
    findings: list[Finding] = []
    for number, group in enumerate(found, 1):
        for path in group:
            width, height = images[path].size
            stays = path == group[0]
            detail = f"{width}x{height}; {'the one to keep' if stays else f'like {Path(group[0]).name}'}"
            findings.append(Finding(kind, path, detail, number, stays))
    return findings


def _bucket_lines(dataset: ResolvedDataset) -> tuple[BucketLine, ...]:
    by_bucket: dict[Size, list[tuple[ImageRecord, Fit]]] = defaultdict(list)
    for record, image_fit in zip(dataset.records, dataset.fits, strict=True):
        by_bucket[image_fit.bucket].append((record, image_fit))
    return tuple(
        BucketLine(
            bucket,
            len(pairs),
            sum(image_fit.cut_share for _, image_fit in pairs) / len(pairs),
            sum(image_fit.enlargement(record.size) for record, image_fit in pairs) / len(pairs),
        )
        for bucket, pairs in sorted(by_bucket.items())
    )


def _count_tags(datasets: Sequence[ResolvedDataset]) -> tuple[tuple[str, int], ...]:
    """Each tag with the number of images that have it, the most frequent first."""
    counts: Counter[str] = Counter()
    for dataset in datasets:
        for record in dataset.records:
            mark = dataset.subset_of(record).captions.caption_separator.strip() or None
            counts.update({tag.strip() for tag in record.caption.split(mark) if tag.strip()})
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
