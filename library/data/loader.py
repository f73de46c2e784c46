"""Loading ahead on threads: decoding and reading run beside the model, results come in the order of the jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def prefetch(
    jobs: Iterable[Job], load: Callable[[Job], Result], workers: int, ahead: int | None = None
) -> Generator[Result, None, None]:
    """Yield ``load(job)`` for each job, in order, computed by ``workers`` threads (0: in the caller, one by one).

    At most ``ahead`` results (default: twice the workers) wait or are in the making, so memory stays bounded. An
    exception of ``load`` is raised at its job's turn. When the iterator is closed, or the caller is interrupted,
    jobs not yet begun are dropped.
    """
    if workers < 1:
        for job in jobs:
            yield load(job)
        return
    most = max(1, 2 * workers if ahead is None else ahead)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        for job in jobs:
            if len(waiting) >= most:
                yield waiting.popleft().result()
            waiting.append(pool.submit(load, job))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
