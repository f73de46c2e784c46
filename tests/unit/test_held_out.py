"""Which images are held out: a share of each subset, by their names, never trained on anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.plan import plan_epoch
from library.data.records import (
    Augmentation,
    CaptionRules,
    DatasetKind,
    DatasetSpec,
    Fit,
    ImageRecord,
    ResolvedDataset,
    SubsetSpec,
)
from library.log import UserError
from library.options import ValidationOptions
from library.training.held_out import hold_out

FIT = Fit((64, 64), (64, 64), (0, 0, 0, 0), 0.0)
LIVELY = SubsetSpec(
    "pictures",
    captions=CaptionRules(shuffle_caption=True, caption_dropout_rate=0.5, caption_prefix="photo of ", keep_tokens=1),
    augmentation=Augmentation(flip_aug=True, random_crop=True),
)


def dataset(paths: list[list[str]], reg: tuple[str, ...] = (), number: int = 0) -> ResolvedDataset:
    """One subset for each list of files, and one of regularisation images."""
    records = [
        ImageRecord(f"{number}.{subset}/{path}", path, (64, 64), "a cat", 3, False, subset)
        for subset, files in enumerate(paths)
        for path in files
    ]
    records += [ImageRecord(f"{number}.r/{path}", path, (64, 64), "", 1, True, len(paths)) for path in reg]
    subsets = (
        *(replace(LIVELY, image_dir=f"set{index}") for index in range(len(paths))),
        SubsetSpec("reg", is_reg=True),
    )
    return ResolvedDataset(DatasetSpec(DatasetKind.DREAMBOOTH, 2, None, subsets), tuple(records), (FIT,) * len(records))


def paths_of(datasets: tuple[ResolvedDataset, ...]) -> list[str]:
    return sorted(record.path for one in datasets for record in one.records)


def names(folder: str, count: int) -> list[str]:
    return [f"{folder}/{index}.png" for index in range(count)]


SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=3)


@given(SIZES, st.floats(0.05, 0.95), st.integers(0, 99))
def test_each_image_once_and_a_share_of_each_subset(sizes: list[int], split: float, seed: int) -> None:
    data = dataset([names(f"set{index}", size) for index, size in enumerate(sizes)], ("reg/a.png",))
    wanted = [min(size - 1, int(size * split + 0.5)) for size in sizes]
    options = ValidationOptions(validation_split=split, validation_seed=seed)
    if not sum(wanted):
        with pytest.raises(UserError, match="holds out no image"):
            hold_out([data], options)
        return
    training, held_out = hold_out([data], options)
    assert paths_of((*training, *held_out)) == paths_of((data,))
    assert "reg/a.png" in paths_of(training)
    for subset, count in enumerate(wanted):
        assert sum(record.subset == subset for record in held_out[0].records) == count
    assert hold_out([data], options) == (training, held_out)
    trained = {training[0].records[sample.record].path for step in plan_epoch(training, 1, 1, 1, 1)
               for micro in step.micro_batches for sample in micro.samples}  # fmt: skip
    assert not trained & set(paths_of(held_out))


def test_the_choice_is_of_names_and_seeds_not_of_folders() -> None:
    def chosen(folder: str, seed: int) -> set[str]:
        _, held_out = hold_out(
            [dataset([names(folder, 20)])], ValidationOptions(validation_split=0.3, validation_seed=seed)
        )
        return {path.rpartition("/")[2] for path in paths_of(held_out)}

    assert chosen("here", 1) == chosen("there/and/further", 1)
    assert chosen("here", 1) != chosen("here", 2)


def test_an_image_of_several_subsets_is_trained_on_in_none() -> None:
    """Two sizes of the same folder, and a part of it repeated: the usual ways in which it would leak."""
    folder = names("cat", 10)
    data = [dataset([folder]), dataset([folder[:5], folder[5:]], tuple(folder[:2]), number=1)]
    training, held_out = hold_out(data, ValidationOptions(validation_split=0.3))
    assert len(held_out) == 2
    assert not set(paths_of(training)) & set(paths_of(held_out))


def test_held_out_images_are_not_disturbed() -> None:
    training, (held_out,) = hold_out([dataset([names("cat", 10)])], ValidationOptions(validation_split=0.2))
    rules = held_out.spec.subsets[0]
    assert rules.augmentation == Augmentation()
    assert not rules.captions.is_random
    assert (rules.captions.caption_prefix, rules.captions.keep_tokens) == ("photo of ", 1)
    assert {record.repeats for record in held_out.records} == {1}
    assert training[0].spec.subsets[0].augmentation.flip_aug
    assert {record.repeats for record in training[0].records} == {3}


def test_nothing_left_and_nothing_asked_for() -> None:
    one = dataset([names("cat", 1)])
    assert hold_out([one], ValidationOptions()) == ((one,), ())
    with pytest.raises(UserError, match="up to 1 images"):
        hold_out([one], ValidationOptions(validation_split=0.9))
    half = ValidationOptions(validation_split=0.5)
    folder = names("cat", 6)
    _, held_out = hold_out([dataset([folder])], half)
    data = [dataset([folder]), dataset([paths_of(held_out)], number=1)]
    with pytest.raises(UserError, match="without images to train on"):
        hold_out(data, half)
