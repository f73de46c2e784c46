"""Resizing, merging and extracting networks: what the exact thin forms save against a full SVD of each dense change.

Factors of random numbers with falling singular values, in the shapes of all layers that a network has. Ours runs over
all of them. The naive way makes the dense product and ``torch.linalg.svd(full_matrices=False)`` of it, once for each
distinct shape, and its time is multiplied by the number of such layers. Both in one run, in turns shape by shape, on
one thread. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Budget, timed
from benchmarks.random_models import TOY
from library.models import build
from library.models.spec import SD1, SDXL, ArchitectureSpec
from library.rng import torch_stream
from networks.lowrank import gram_svd, product_svd, randomised_svd, stacked_product
from networks.targets import find_targets

SPECS = {"sd15": SD1, "sdxl": SDXL, "toy": TOY}
PUBLISHED = ("sd15", "sdxl")
RATIOS = (0.7, 0.4)
BUDGETS = {
    title: Budget(f"{title} by thin decompositions, times as fast as a full SVD", limit, at_least=True)
    for title, limit in (("resizing", 100), ("merging two", 50))
}
ERROR_BUDGET = Budget("relative error in float32", 1e-5)
Shape = tuple[int, int]
Factors = tuple[Tensor, Tensor]
Term = tuple[float, Tensor, Tensor]


def layer_shapes(spec: ArchitectureSpec, with_convolutions: bool) -> Counter[Shape]:
    """How many layers have which matrix (O, I · kernel area)."""
    texts = [build.empty_text_encoder(text) for text in spec.text_encoders]
    found = find_targets(texts, build.empty_unet(spec.unet), with_convolutions)
    shapes = [tuple(dict(target.layer.named_parameters())["weight"].shape) for target in found]
    return Counter((shape[0], torch.Size(shape[1:]).numel()) for shape in shapes)


def factors(shape: Shape, rank: int, index: int) -> Factors:
    """A trained network's spectrum falls; so does this one's, by half within each eighth of the rank."""
    generator = torch_stream(index, "factors", *shape)
    up = torch.randn(shape[0], rank, generator=generator) / shape[0] ** 0.5
    down = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    return up * 0.5 ** (torch.arange(rank) * 8 / rank), down


def naive(matrix: Tensor, rank: int) -> Factors:
    """Full SVD of a dense matrix, cut."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * singular[:rank], right[:rank]


@dataclass
class Figures:
    """Seconds of the processor over all layers, and the largest relative difference to the naive way in float64."""

    ours: float = 0.0
    naive: float = 0.0
    errors: dict[str, float] = field(default_factory=dict[str, float])

    def note(self, name: str, found: Factors, exact: Tensor) -> None:
        """Remember the relative error of a product."""
        error = float((found[0].double() @ found[1].double() - exact).norm() / exact.norm())
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    def lines(self, title: str, model: str) -> str:
        """The figures as text, and their budgets; ``title`` is one of `BUDGETS`."""
        errors = ", ".join(f"{name} {value:.1e}" for name, value in self.errors.items())
        ratio = self.naive / self.ours
        return "\n".join(
            (
                f"  {title}: ours {self.ours:.2f} s, naive {self.naive:.1f} s, {ratio:.0f} times as fast; "
                f"largest relative error: {errors}",
                BUDGETS[title].line(ratio, model),
                ERROR_BUDGET.line(self.errors["float32"], f"{title}, {model}"),
            )
        )


def measure(shapes: Counter[Shape], rank: int, new_rank: int, ratios: tuple[float, ...]) -> Figures:
    """``Σ ratio · up @ down`` over pairs of random factors of ``rank``, cut to ``new_rank``, for all layers."""
    figures = Figures()
    for number, (shape, count) in enumerate(shapes.items()):
        made = [(ratio, *factors(shape, rank, 10 * number + part)) for part, ratio in enumerate(ratios)]
        thin(made, new_rank)  # so that neither way pays for first use
        figures.ours += timed(functools.partial(_repeat, count, thin, made, new_rank)).processor
        figures.naive += timed(functools.partial(dense, made, new_rank)).processor * count
        wide = [(ratio, up.double(), down.double()) for ratio, up, down in made]
        exact = torch.mm(*dense(wide, new_rank))
        figures.note("float32", thin(made, new_rank), exact)
        figures.note("float64", thin(wide, new_rank), exact)
        figures.note("naive float32", dense(made, new_rank), exact)
    return figures


def _repeat(count: int, way: Callable[[list[Term], int], Factors], terms: list[Term], rank: int) -> None:
    for _ in range(count):
        way(terms, rank)


def thin(terms: list[Term], rank: int) -> Factors:
    """Our way."""
    return product_svd(*stacked_product(terms)).split(rank)


def dense(terms: list[Term], rank: int) -> Factors:
    """The naive way."""
    ratio, up, down = terms[0]
    result = ratio * (up @ down)
    for ratio, up, down in terms[1:]:
        result += ratio * (up @ down)
    return naive(result, rank)


def extraction(shapes: Counter[Shape], rank: int) -> list[str]:
    """The first singular values of full changes whose singular values fall like 1/√index, a line for each method."""
    seconds: defaultdict[str, float] = defaultdict(float)
    lost: dict[str, float] = {}
    gap = 0.0
    for shape, count in shapes.items():
        matrix = _full_change(shape)
        ways: dict[str, Callable[[], object]] = {
            "naive": functools.partial(naive, matrix, rank),
            "exact (Gram, float64)": functools.partial(gram_svd, matrix, rank),
            "randomised": functools.partial(randomised_svd, matrix, rank, torch_stream(0, "sketch")),
        }
        for name, way in ways.items():
            seconds[name] += timed(way).processor * count
        best = float((matrix - torch.mm(*naive(matrix, rank))).norm())
        sketch = randomised_svd(matrix, rank, torch_stream(0, "sketch"))
        exact = float((matrix - torch.mm(*gram_svd(matrix, rank).split(rank))).norm())
        gap = max(gap, sketch.best_share - sketch.kept_share)
        for name, value in (("exact (Gram, float64)", exact), ("randomised", sketch.lost), ("naive", best)):
            lost[name] = max(lost.get(name, 0.0), value / best)
    return [
        f"  {name}: {total:.1f} s, {seconds['naive'] / total:.1f} times as fast as naive; "
        f"leaves out at most {lost[name]:.6f} of what the best leaves out"
        for name, total in seconds.items()
    ] + [f"  randomised: what it says that the best could keep is at most {gap:.4f} of the norm above what it keeps"]


def _full_change(shape: Shape) -> Tensor:
    """Columns of falling size, turned by random numbers: no need for a decomposition to make it."""
    generator = torch_stream(1, "change", *shape)
    inner = min(shape)
    up = torch.randn(shape[0], inner, generator=generator) / torch.arange(1, inner + 1) ** 0.5
    return up @ torch.randn(inner, shape[1], generator=generator)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Thin decompositions against the full SVD of dense changes.")
    parser.add_argument("--models", nargs="*", choices=sorted(SPECS), default=PUBLISHED, help="layers of these")
    parser.add_argument("--rank", type=int, default=64, help="rank of the networks (64)")
    parser.add_argument("--new_rank", type=int, default=16, help="rank after resizing and merging (16)")
    parser.add_argument("--convolutions", action="store_true", help="also layers that only networks with conv_dim have")
    parser.add_argument("--extraction", action="store_true", help="also the first singular values of full changes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        shapes = layer_shapes(SPECS[name], options.convolutions)
        print(f"{name}: {shapes.total()} layers of {len(shapes)} shapes, rank {options.rank} to {options.new_rank}")
        resized = measure(shapes, options.rank, options.new_rank, (1.0,))
        print(resized.lines("resizing", name), flush=True)
        merged = measure(shapes, options.rank, options.new_rank, RATIOS)
        print(merged.lines("merging two", name), flush=True)
        if options.extraction:
            print(f"extraction of rank {options.rank}:", *extraction(shapes, options.rank), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
