"""Facts about resolved data sets that go into the metadata of saved models, as plain structures with the reference's
names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.data.plan import bucket_visits
from library.data.records import DatasetKind, ResolvedDataset, SubsetSpec


@dataclass(frozen=True)
class DatasetFacts:
    """What the ``ss_`` keys of the same names say about the images; no path beyond a folder's own name.

    ``datasets``: one table for each data set. ``dataset_dirs``: all subsets but those of regularisation images, which
    are in ``reg_dataset_dirs``. ``bucket_info``: of the first data set; None without buckets. Counts of images
    include repeats.
    """

    num_train_images: int
    num_reg_images: int
    datasets: list[dict[str, Any]]
    tag_frequency: dict[str, dict[str, int]]
    dataset_dirs: dict[str, dict[str, int]]
    reg_dataset_dirs: dict[str, dict[str, int]]
    bucket_info: dict[str, Any] | None


def metadata_facts(datasets: Sequence[ResolvedDataset]) -> DatasetFacts:
    """Collect the facts of all data sets. Where two have a folder of the same name, the first one's tags count."""
    tags: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for name, counts in tag_frequency(dataset).items():
            tags.setdefault(name, counts)
    return DatasetFacts(
        num_train_images=sum(_visit_count(dataset, is_reg=False) for dataset in datasets),
        num_reg_images=sum(_visit_count(dataset, is_reg=True) for dataset in datasets),
        datasets=[_dataset_table(dataset) for dataset in datasets],
        tag_frequency=tags,
        dataset_dirs=_folder_table(datasets, is_reg=False),
        reg_dataset_dirs=_folder_table(datasets, is_reg=True),
        bucket_info=bucket_info(datasets[0]) if datasets else None,
    )


def tag_frequency(dataset: ResolvedDataset) -> dict[str, dict[str, int]]:
    """For each folder (or metadata file): how many images have each tag, in lower case. Repeats do not count."""
    counts: dict[str, Counter[str]] = {}
    for record in dataset.records:
        subset = dataset.subset_of(record)
        tags = (tag.strip().lower() for tag in record.caption.split(subset.captions.caption_separator))
        counts.setdefault(own_name(subset), Counter()).update(tag for tag in tags if tag)
    return {name: dict(counter) for name, counter in counts.items()}


def bucket_info(dataset: ResolvedDataset) -> dict[str, Any] | None:
    """Training sizes in use with their visits in the first epoch, and the mean difference of aspect ratios."""
    if not _uses_buckets(dataset):
        return None
    counts = bucket_visits(dataset, 1)
    return {
        "buckets": {
            str(index): {"resolution": list(size), "count": counts[size]} for index, size in enumerate(sorted(counts))
        },
        "mean_img_ar_error": dataset.mean_ar_error,
    }


def own_name(subset: SubsetSpec) -> str:
    """The last part of the subset's path."""
    return _last_part(subset.name)


def _last_part(path: str) -> str:
    return os.path.basename(os.path.normpath(path))


def _uses_buckets(dataset: ResolvedDataset) -> bool:
    rules = dataset.spec.buckets
    return rules is None or rules.enable_bucket or all(record.train_resolution for record in dataset.records)


def _visit_count(dataset: ResolvedDataset, *, is_reg: bool) -> int:
    return sum(record.repeats for record in dataset.records if record.is_reg is is_reg)


def _dataset_table(dataset: ResolvedDataset) -> dict[str, Any]:
    spec, rules = dataset.spec, dataset.spec.buckets
    return {
        "is_dreambooth": spec.kind is DatasetKind.DREAMBOOTH,
        "batch_size_per_device": spec.batch_size,
        "num_train_images": _visit_count(dataset, is_reg=False),
        "num_reg_images": _visit_count(dataset, is_reg=True),
        "resolution": list(rules.resolution) if rules is not None else None,
        "enable_bucket": _uses_buckets(dataset),
        "min_bucket_reso": rules.min_bucket_reso if rules is not None else None,
        "max_bucket_reso": rules.max_bucket_reso if rules is not None else None,
        "tag_frequency": tag_frequency(dataset),
        "bucket_info": bucket_info(dataset),
        "subsets": [_subset_table(dataset, index) for index in range(len(spec.subsets))],
    }


def _subset_table(dataset: ResolvedDataset, index: int) -> dict[str, Any]:
    subset = dataset.spec.subsets[index]
    captions, augmentation = subset.captions, subset.augmentation
    table: dict[str, Any] = {
        "img_count": len(dataset.records_of(index)),
        "num_repeats": subset.num_repeats,
        "color_aug": augmentation.color_aug,
        "flip_aug": augmentation.flip_aug,
        "random_crop": augmentation.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator or None,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix or None,
        "caption_suffix": captions.caption_suffix or None,
        "image_dir": _last_part(subset.image_dir) if subset.image_dir else None,
    }
    if subset.mask_dir is not None:
        table["conditioning_data_dir"] = _last_part(subset.mask_dir)
    if subset.alpha_mask:
        table["alpha_mask"] = True
    if dataset.spec.kind is DatasetKind.DREAMBOOTH:
        return {**table, "class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    if subset.conditioning_data_dir is not None:
        return {**table, "conditioning_data_dir": _last_part(subset.conditioning_data_dir)}
    return {**table, "metadata_file": own_name(subset)}


def _folder_table(datasets: Sequence[ResolvedDataset], *, is_reg: bool) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for index, subset in enumerate(dataset.spec.subsets):
            if subset.is_reg is not is_reg:
                continue
            name, number = own_name(subset), 2
            while name in table:
                name, number = f"{own_name(subset)} ({number})", number + 1
            table[name] = {"n_repeats": subset.num_repeats, "img_count": len(dataset.records_of(index))}
    return table
