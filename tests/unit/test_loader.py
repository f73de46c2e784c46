"""Loading ahead on threads."""

from __future__ import annotations

import threading
import time

import pytest

from library.data.loader import prefetch


def slow_square(value: int) -> int:
    time.sleep(0.002 * (value % 3))
    return value * value


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    assert list(prefetch(range(40), slow_square, workers)) == [value * value for value in range(40)]
    assert list(prefetch([], slow_square, workers)) == []


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (2, 3), (4, 8), (3, 1)])
def test_no_more_is_made_than_may_wait(workers: int, ahead: int) -> None:
    begun: list[int] = []
    taken = 0
    for _ in prefetch(iter(range(50)), lambda job: begun.append(job) or job, workers, ahead):
        taken += 1
        time.sleep(0.001)
        assert len(begun) <= taken + ahead
    assert taken == 50


def test_workers_really_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=5)
    assert len(list(prefetch(range(6), lambda _: together.wait(), 3, 6))) == 6


@pytest.mark.parametrize("workers", [0, 3])
def test_an_exception_surfaces_at_its_job_after_the_earlier_results(workers: int) -> None:
    def load(job: int) -> int:
        if job == 5:
            raise OSError("photo.png is broken")
        return job

    results = prefetch(range(20), load, workers)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match=r"photo\.png"):
        next(results)


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_drops_what_was_not_begun(workers: int) -> None:
    begun: list[int] = []

    def load(job: int) -> int:
        begun.append(job)
        time.sleep(0.02)
        return job

    results = prefetch(range(1000), load, workers, ahead=100)
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 0.5
    time.sleep(0.1)
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count <= 2 * workers + 4


def test_an_interrupt_ends_the_threads() -> None:
    before = threading.active_count()

    def run() -> None:
        for value in prefetch(range(1000), slow_square, 3):
            if value > 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
