"""Dynamic variants in prompt lines: ``{a|b}``, ``{2$$a|b|c}``, ``{1-2$$ and $$a|b|c}``, ``{e$$a|b}``.

A group is ``{`` [``e$$``] [count ``$$``] [separator ``$$``] variant {``|`` variant} ``}``. Groups may stand inside
variants; ``\\{`` and ``\\}`` are plain braces; braces without a partner, and ``{}``, are text.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from library.log import UserError

DEFAULT_SEPARATOR = ", "
MAX_LINES = 10_000
_HEAD = re.compile(
    r"(?P<all>[eE]\$\$)?(?:(?P<count>-?\d[-\d]*)\$\$)?(?:(?P<separator>(?:(?!\$\$)[^|])+)\$\$)?", re.DOTALL
)
_RANGE = re.compile(r"(\d+)(?:-(\d+))?$")


@dataclass(frozen=True, slots=True)
class Group:
    """``low`` to ``high`` different variants are chosen; with ``all`` every combination is wanted."""

    all: bool
    low: int
    high: int
    separator: str
    variants: tuple[Sequence[str | Group], ...]


Nodes = Sequence["str | Group"]


def expand(line: str, images: int, rng: random.Random) -> list[str]:
    """The lines that a raw line stands for.

    With enumerating groups every combination once; with random groups only, ``images`` draws; without any the line
    itself, once. Raises UserError for a group that cannot be.
    """
    nodes = parse(line)
    if not _has_group(nodes):
        return [_plain(nodes)]
    combinations = list(itertools.islice(_combinations(nodes), MAX_LINES + 1))
    if len(combinations) > MAX_LINES:
        raise UserError(f"the variants have more than {MAX_LINES} combinations; leave out an e$$")
    if _enumerates(nodes):
        return [_draw(combination, rng) for combination in combinations]
    return [_draw(nodes, rng) for _ in range(images)]


def parse(line: str) -> Nodes:
    """A line as texts and groups."""
    nodes, _ = _read(line, 0, inside=False)
    return nodes[0]


# ---- reading


def _read(text: str, start: int, inside: bool) -> tuple[list[list[str | Group]], int]:
    """Alternatives from ``start`` up to the brace that closes this group (or the end), and the place after it."""
    alternatives: list[list[str | Group]] = [[]]
    place = start
    while place < len(text):
        sign = text[place]
        if sign == "\\" and text[place + 1 : place + 2] in ("{", "}"):
            _add(alternatives[-1], text[place + 1])
            place += 2
        elif sign == "{" and (closed := _closing(text, place)) is not None and closed > place + 1:
            alternatives[-1].append(_group(text, place + 1))
            place = closed + 1
        elif inside and sign == "}":
            return alternatives, place + 1
        elif inside and sign == "|":
            alternatives.append([])
            place += 1
        elif text.startswith("{}", place):
            _add(alternatives[-1], "{}")
            place += 2
        else:
            _add(alternatives[-1], sign)
            place += 1
    return alternatives, place


def _add(nodes: list[str | Group], text: str) -> None:
    if nodes and isinstance(nodes[-1], str):
        nodes[-1] += text
    else:
        nodes.append(text)


def _closing(text: str, start: int) -> int | None:
    """Where the group that opens at ``start`` is closed; None if it is not."""
    depth = 0
    place = start
    while place < len(text):
        if text[place] == "\\" and text[place + 1 : place + 2] in ("{", "}"):
            place += 1
        elif text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    return None


def _group(text: str, start: int) -> Group:
    head = _HEAD.match(text, start, _closing(text, start - 1) or len(text))  # never beyond the group
    assert head is not None  # all its parts may be absent
    variants, _ = _read(text, head.end(), inside=True)
    low, high = _count(head["count"], len(variants))
    return Group(bool(head["all"]), low, high, head["separator"] or DEFAULT_SEPARATOR, tuple(variants))


def _count(text: str | None, available: int) -> tuple[int, int]:
    """How many variants are wanted, at least and at most. Raises UserError for what is no count."""
    if not text:
        return 1, 1
    match = _RANGE.match(text)
    if match is None:
        raise UserError(f"{{{text}$$...}}: the number of variants must be like 2 or 1-3")
    low, high = sorted((int(match[1]), int(match[2] or match[1])))
    if low > available:
        raise UserError(f"{{{text}$$...}}: {low} variants are wanted, there are {available}")
    return low, min(high, available)


# ---- choosing


def _has_group(nodes: Nodes) -> bool:
    return any(isinstance(node, Group) for node in nodes)


def _enumerates(nodes: Nodes) -> bool:
    groups = [node for node in nodes if isinstance(node, Group)]
    return any(group.all or any(_enumerates(variant) for variant in group.variants) for group in groups)


def _plain(nodes: Nodes) -> str:
    return "".join(node for node in nodes if isinstance(node, str))


def _draw(nodes: Nodes, rng: random.Random) -> str:
    """One line: each group chosen at random, independently."""
    parts: list[str] = []
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
            continue
        chosen = rng.sample(node.variants, rng.randint(node.low, node.high))
        parts.append(node.separator.join(_draw(variant, rng) for variant in chosen))
    return "".join(parts)


def _combinations(nodes: Nodes) -> Iterator[Nodes]:
    """The same line once for every combination of its enumerating groups, the first group outermost; others stay."""
    choices = [list(itertools.islice(_choices(node), MAX_LINES + 1)) for node in nodes]
    for chosen in itertools.product(*choices):
        yield list(itertools.chain.from_iterable(chosen))


def _choices(node: str | Group) -> Iterator[Nodes]:
    """What can stand in the place of a node when its enumerating groups are resolved."""
    if isinstance(node, str) or not _enumerates([node]):
        yield [node]
    elif node.all:
        for count in range(node.low, node.high + 1):
            for subset in itertools.combinations(node.variants, count):
                for chosen in itertools.product(*(list(_combinations(variant)) for variant in subset)):
                    yield _joined(chosen, node.separator)
    else:  # a random group around an enumerating one: each of its variants' combinations takes part
        variants = tuple(combination for variant in node.variants for combination in _combinations(variant))
        yield [replace(node, variants=variants)]


def _joined(parts: Sequence[Nodes], separator: str) -> list[str | Group]:
    joined: list[str | Group] = []
    for index, part in enumerate(parts):
        if index:
            joined.append(separator)
        joined.extend(part)
    return joined
