"""What the measurements share: turns that alternate, medians, and the memory of a process.

Speeds are compared as ratios within one run, turn by turn, so that a busy machine slows both sides alike. No test
depends on a time.
"""

from __future__ import annotations

import statistics
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor

MEGABYTE = 1e6


BUDGET_MARK = "budget: "
"""How a line begins that `benchmarks/all.py` takes into its table."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a figure is to be: at most ``limit``, or at least. ``unit`` empty: a ratio. No test looks at it."""

    what: str
    limit: float
    unit: str = ""
    at_least: bool = False

    def line(self, value: float, case: str = "") -> str:
        """The figure beside its budget, in the columns of `benchmarks/all.py`. ``case``: what it was measured on."""
        is_met = value >= self.limit if self.at_least else value <= self.limit
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"
        share = f"{value / self.limit:.3g} of it"
        what = f"{self.what}, {case}" if case else self.what
        return BUDGET_MARK + " | ".join((what, f"{value:.3g}{self.unit}", bound, share, "met" if is_met else "missed"))


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn took, in seconds: on the wall's clock, and on that of this process's threads together."""

    wall: float
    processor: float


@dataclass
class Timings:
    """The turns by name, in their order."""

    turns: dict[str, list[Turn]] = field(default_factory=dict[str, list[Turn]])

    def ratios(self, name: str, base: str) -> Turn:
        """Medians of the turns' own ratios: each turn is compared with the one that ran beside it."""
        pairs = list(zip(self.turns[name], self.turns[base], strict=True))
        wall = statistics.median(a.wall / b.wall for a, b in pairs)
        return Turn(wall, statistics.median(a.processor / b.processor for a, b in pairs))

    def lines(self, base: str) -> str:
        """The figures as text, one line a name. Other programs disturb the processor's ratio less than the wall's."""
        rows: list[str] = []
        for name, turns in self.turns.items():
            wall, processor = (statistics.median(getattr(turn, kind) for turn in turns) for kind in Turn.__slots__)
            text = f"{name:<6} wall {wall * 1000:9.2f} ms, processor {processor * 1000:9.2f} ms, median of {len(turns)}"
            if name != base:
                ratio = self.ratios(name, base)
                text += f"; over {base}: wall {ratio.wall:.3f}, processor {ratio.processor:.3f}"
            rows.append(text)
        return "\n".join(rows)


def timed(action: Callable[[], object]) -> Turn:
    """Do it once and say what it took."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return Turn(time.perf_counter() - wall, time.process_time() - processor)


def alternate(turns: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> Timings:
    """Run all turns ``rounds`` times, A B then B A, so that neither is always the first, after warm-up rounds."""
    timings = Timings({name: [] for name in turns})
    for number in range(-warm_up, rounds):
        for name in list(turns)[:: 1 if number % 2 == 0 else -1]:
            turn = timed(turns[name])
            if number >= 0:
                timings.turns[name].append(turn)
    return timings


class PeakMemory:
    """The largest resident memory seen inside the block above that at its start, in bytes.

    File pages count. It is looked at now and then by a thread, which costs the work in the block about a hundredth.
    """

    def __init__(self, interval_s: float = 0.01) -> None:
        self.above_start = 0
        self._interval_s = interval_s
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._start = self._resident_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._done.set()
        self._thread.join()

    def _resident_bytes(self) -> int:
        return self._process.memory_info().rss

    def _look(self) -> None:
        self.above_start = max(self.above_start, self._resident_bytes() - self._start)

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self._look()


class _Kept:
    """One tensor as autograd keeps it; it lives as long as autograd needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """The bytes that autograd keeps of the forward passes in the block until their backward passes.

    Each storage counts once and as a whole, whatever number of views is kept of it; those of ``held`` (weights, which
    are in memory anyway) do not count. The figure does not depend on the device. Of a checkpointed block only its
    inputs are kept, and counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.add(kept)
        return kept

    @property
    def total(self) -> int:
        """What is kept at this moment: to be read before the backward pass."""
        storages = [kept.tensor.untyped_storage() for kept in self._kept]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for place, size in sizes.items() if place not in self._held)


def saved_by_operation(result: Tensor, held: Iterable[Tensor] = ()) -> dict[str, int]:
    """The bytes that the graph behind ``result`` keeps, most first, by the names of the operations that need them.

    Counted as `SavedBytes` counts; a storage that several operations need stands under all their names. Not for graphs
    with checkpointed blocks: looking at those computes them again.
    """
    held_places = {tensor.untyped_storage().data_ptr() for tensor in held}
    sizes: dict[int, int] = {}
    users: dict[int, set[str]] = {}
    seen: set[Any] = {None}
    waiting: list[Any] = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for tensor in _kept_by(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held_places:
                sizes[storage.data_ptr()] = storage.nbytes()
                users.setdefault(storage.data_ptr(), set()).add(node.name().partition("Backward")[0].strip("_"))
    totals: Counter[str] = Counter()
    for place, size in sizes.items():
        totals[" + ".join(sorted(users[place]))] += size
    return dict(totals.most_common())


def _kept_by(node: Any) -> Iterator[Tensor]:
    """A node's tensors: torch's own operations have an attribute for each, functions in Python one for all."""
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            value = getattr(node, name)
            values: list[Any] = list(value) if isinstance(value, tuple | list) else [value]
            yield from (one for one in values if isinstance(one, Tensor))
