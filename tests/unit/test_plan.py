"""Epoch plans: every image its repeats, regularisation in turn, the same for every arrangement."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.plan import batches_per_epoch, plan_epoch, steps_of_epochs, steps_per_epoch
from library.data.records import (
    DatasetKind,
    DatasetSpec,
    Fit,
    ImageRecord,
    MicroBatch,
    ResolvedDataset,
    Sample,
    StepPlan,
    SubsetSpec,
)

BUCKETS = [(512, 512), (384, 640), (640, 384)]


def dataset(train: list[tuple[int, int]], reg: list[tuple[int, int]] | None = None, batch: int = 1) -> ResolvedDataset:
    """Images as (repeats, index of their bucket)."""
    images = [(*image, False) for image in train] + [(*image, True) for image in reg or []]
    records = tuple(
        ImageRecord(f"{i}", f"{i}.png", (512, 512), "", repeats, is_reg, 0)
        for i, (repeats, _, is_reg) in enumerate(images)
    )
    fits = tuple(Fit(BUCKETS[bucket], BUCKETS[bucket], (0, 0, 0, 0), 0.0) for _, bucket, _ in images)
    return ResolvedDataset(DatasetSpec(DatasetKind.DREAMBOOTH, batch, None, (SubsetSpec("x"),)), records, fits)


def samples(plan: tuple[StepPlan, ...]) -> list[tuple[int, Sample]]:
    return [(micro.dataset, sample) for step in plan for micro in step.micro_batches for sample in micro.samples]


def visits(data: ResolvedDataset, epoch: int) -> Counter[int]:
    return Counter(sample.record for _, sample in samples(plan_epoch([data], 1, epoch, 1, 1)))


IMAGES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=12)


@settings(max_examples=30)
@given(st.lists(IMAGES, min_size=1, max_size=3), IMAGES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_every_visit_once_and_counts_agree(
    sets: list[list[tuple[int, int]]], reg: list[tuple[int, int]], batch: int, processes: int, accumulation: int
) -> None:
    data = [dataset(images, reg if index == 0 else None, batch) for index, images in enumerate(sets)]
    for epoch in (1, 2):
        plan = plan_epoch(data, 7, epoch, processes, accumulation)
        found = samples(plan)
        assert len(set(found)) == len(found)
        for index, images in enumerate(sets):
            mine = Counter(sample.record for number, sample in found if number == index)
            assert {record: mine[record] for record in range(len(images))} == dict(enumerate(r for r, _ in images))
        assert sum(len(step.micro_batches) for step in plan) == batches_per_epoch(data, processes, epoch)
        assert len(plan) == steps_per_epoch(data, processes, accumulation, epoch)
        assert all(len(step.micro_batches) == accumulation for step in plan[:-1])
        for step in plan:
            for micro in step.micro_batches:
                assert 1 <= len(micro.samples) <= batch * processes
                assert len({data[micro.dataset].fits[sample.record].bucket for sample in micro.samples}) == 1
    both = [len(plan_epoch(data, 7, epoch, processes, accumulation)) for epoch in (1, 2)]
    assert steps_of_epochs(data, processes, accumulation, 2) == sum(both)


def test_only_the_last_chunk_of_a_bucket_is_short() -> None:
    plan = plan_epoch([dataset([(5, 0), (2, 1), (4, 0)], batch=2)], 1, 1, 2, 1)
    assert sorted(step.sample_count for step in plan) == [1, 2, 4, 4]


def test_order_depends_on_seed_and_epoch_only() -> None:
    data = [dataset([(1, index % 3) for index in range(60)], batch=2)]
    first = plan_epoch(data, 1, 1, 1, 1)
    assert plan_epoch(data, 1, 1, 1, 1) == first
    assert plan_epoch(data, 1, 2, 1, 1) != first
    assert plan_epoch(data, 2, 1, 1, 1) != first

    def partners(plan: tuple[StepPlan, ...]) -> set[frozenset[int]]:
        return {frozenset(sample.record for sample in step.micro_batches[0].samples) for step in plan}

    common = partners(first) & partners(plan_epoch(data, 1, 2, 1, 1))
    assert len(common) < 10, "not only the order of the batches changes from epoch to epoch, also what is in them"


def test_two_processes_take_what_one_with_twice_the_batch_takes() -> None:
    images = [(2, index % 3) for index in range(25)]
    one = plan_epoch([dataset(images, batch=4)], 3, 1, 1, 1)
    two = plan_epoch([dataset(images, batch=2)], 3, 1, 2, 1)
    assert one == two
    for step in two:
        shares = [step.micro_batches[0].share(rank, 2) for rank in range(2)]
        counted = [sample for share, counts in shares if counts for sample in share]
        assert sorted(counted, key=lambda s: (s.record, s.repeat)) == sorted(
            step.micro_batches[0].samples, key=lambda s: (s.record, s.repeat)
        )


def test_accumulation_takes_what_the_big_batch_takes() -> None:
    images = [(1, 0)] * 22
    big = plan_epoch([dataset(images, batch=4)], 3, 1, 1, 1)
    small = plan_epoch([dataset(images, batch=1)], 3, 1, 1, 4)

    def flat(plan: tuple[StepPlan, ...]) -> list[list[Sample]]:
        return [[sample for micro in step.micro_batches for sample in micro.samples] for step in plan]

    assert flat(small) == flat(big)


@pytest.mark.parametrize(
    ("train", "reg", "expected"),
    [
        ([3] * 3, [1] * 4, [3, 2, 2, 2]),
        ([3] * 3, [2] * 4, [3, 2, 2, 2]),
        ([1] * 3, [1] * 4, [1, 1, 1, 0]),
        ([5] * 3, [1] * 4, [4, 4, 4, 3]),
    ],
)
def test_regularisation_balances_the_first_epoch(train: list[int], reg: list[int], expected: list[int]) -> None:
    data = dataset([(repeats, 0) for repeats in train], [(repeats, 0) for repeats in reg])
    found = visits(data, 1)
    assert [found[len(train) + index] for index in range(len(reg))] == expected


def test_regularisation_rotates_so_that_all_are_used_alike() -> None:
    data = dataset([(1, 0)] * 3, [(1, 0)] * 4)
    total: Counter[int] = Counter()
    for epoch in range(1, 5):
        found = visits(data, epoch)
        assert sum(found[record] for record in range(3, 7)) == 3
        total += found
    assert [total[record] for record in range(3, 7)] == [3, 3, 3, 3]


def test_a_regularisation_image_of_two_repeats_comes_twice_as_often() -> None:
    data = dataset([(6, 0)], [(2, 0), (1, 0)])
    found = visits(data, 1)
    assert (found[1], found[2]) == (4, 2)


def test_merging_mixes_the_buckets_anew_in_each_epoch() -> None:
    data = [dataset([(1, 0)] * 50 + [(1, 1)] * 50)]

    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        plan = plan_epoch(data, seed, epoch, 1, 1)
        return [data[0].fits[step.micro_batches[0].samples[0].record].bucket for step in plan]

    first_half = Counter(order(1, 1)[:50])
    assert 10 < first_half[BUCKETS[0]] < 40, "buckets are mixed, not taken one after the other"
    assert order(1, 1) not in (order(1, 2), order(2, 1))


def test_step_counts_its_samples() -> None:
    micro = MicroBatch(0, (Sample(0, 0), Sample(1, 0)))
    assert StepPlan((micro, micro)).sample_count == 4
