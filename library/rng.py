"""Named seed streams: every random draw of the program is a function of (seed, names), never of a global state.

A stream's name says what the draw is for, for example ``seed_of(seed, "noise", epoch, image_key, repeat)``. So the
order in which work is done, the number of workers and a resumed run change no draw.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BITS = 63  # torch.Generator.manual_seed takes a signed 64-bit integer


def seed_of(seed: int, *names: str | int) -> int:
    """A 63-bit seed derived from ``seed`` and ``names``; different names give independent seeds.

    A name may be that of a file, which need not be text (what is not is in it as lone surrogates).
    """
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _BITS)


def fresh_seed() -> int:
    """A seed below 2**32 from the system's source of randomness, where the user gave none."""
    return random.SystemRandom().randrange(2**32)


def stream(seed: int, *names: str | int) -> random.Random:
    """A private Python generator for one purpose."""
    return random.Random(seed_of(seed, *names))


def torch_stream(seed: int, *names: str | int) -> torch.Generator:
    """A private torch generator on the CPU for one purpose: the same draws on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed_of(seed, *names))
