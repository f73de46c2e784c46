"""What is in a network file: layers, ranks, how far each block moved, whether all values are finite, its hash.

Works on the file's tensors alone. Pairs ``lora_down``/``lora_up`` are understood here; for other kinds a function
``inspect_weights(tensors) -> {module name: norm of its weight change}`` says more.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from library.checkpoint.hashes import MODEL_HASH_KEY, data_sha256
from library.checkpoint.io import is_safetensors, open_model_file

Inspector = Callable[[Mapping[str, Tensor]], Mapping[str, float]]

_UNET_BLOCK = re.compile(r"_unet_(?P<block>(?:down|up)_blocks_\d+|mid_block|(?:input|output)_blocks_\d+|middle_block)_")
_TEXT_ENCODER = re.compile(r"^[a-z]+_te(?P<number>\d?)_")


@dataclass(frozen=True, slots=True)
class BlockChange:
    """How far the weights of one block moved: Frobenius norm over all its layers at multiplier 1."""

    block: str
    modules: int
    norm: float


@dataclass(frozen=True, slots=True)
class NetworkCheck:
    """What a saved network file holds. ``ranks`` counts modules by rank; ``unmoved`` modules change nothing.

    ``sha256``: of the bytes behind the header, as they are, and as the file's metadata say; None where there is none.
    """

    file: str
    modules: int
    ranks: Mapping[int, int]
    blocks: tuple[BlockChange, ...]
    not_finite: tuple[str, ...]
    unmoved: tuple[str, ...]
    unmeasured: int
    sha256: str | None = None
    sha256_said: str | None = None
    title: str = "norm of the weight change"
    """What the numbers of the blocks are."""

    @property
    def norm(self) -> float:
        """Frobenius norm of all measured weight changes together."""
        return sum(change.norm**2 for change in self.blocks) ** 0.5

    @property
    def problems(self) -> list[str]:
        """What should worry the user, one line each."""
        found: list[str] = []
        if self.modules == 0:
            found.append(f"{self.file}: the saved network is empty")
        if self.not_finite:
            found.append(
                f"{self.file}: {len(self.not_finite)} tensors hold NaN or infinite values, first {self.not_finite[0]}; "
                "do not use this file"
            )
        if self.unmoved and len(self.unmoved) == self.modules:
            found.append(
                f"{self.file}: no layer moved, the network has no effect: no step was made yet, or its rates were 0"
            )
        elif self.unmoved:
            share = f"{len(self.unmoved)} of {self.modules} layers did not move"
            found.append(f"{self.file}: {share}, first {self.unmoved[0]}")
        if self.sha256_said is not None and self.sha256 != self.sha256_said:
            found.append(
                f"{self.file}: its metadata give another hash of its tensors: it was changed after it was made"
            )
        return found

    def lines(self) -> list[str]:
        """The report as text."""
        ranks = ", ".join(f"rank {rank} x {count}" for rank, count in sorted(self.ranks.items()))
        finite = "" if self.not_finite else ", all values finite"
        text = [f"{self.file}: {self.modules} layers{f' ({ranks})' if ranks else ''}{finite}"]
        if self.blocks:
            changes = ", ".join(f"{change.block} {change.norm:.3g}" for change in self.blocks)
            text.append(f"{self.title} by block: {changes}")
        if self.unmeasured:
            text.append(f"{self.unmeasured} layers are of a kind whose weight change is not measured")
        if self.sha256:
            text.append(f"SHA-256 of its tensors: {self.sha256}")
        return text + self.problems


def check_network_file(path: str | Path, inspect: Inspector | None = None) -> NetworkCheck:
    """Read a saved network and measure it. Raises UserError if the file cannot be read."""
    with open_model_file(path) as file:
        tensors = {key: file.tensor(key) for key in file.infos}
        metadata = file.metadata
    return with_hash(check_network(tensors, Path(path).name, inspect), path, metadata)


def with_hash(check: NetworkCheck, path: str | Path, metadata: Mapping[str, str]) -> NetworkCheck:
    """The same with what is known of the hash of the file at ``path``; pickles have none."""
    if not is_safetensors(path):
        return check
    said = metadata.get(MODEL_HASH_KEY)
    if said and said.startswith("0x"):  # LyCORIS' own kind of hash, of the tensors one by one
        said = None
    return replace(check, sha256=data_sha256(path), sha256_said=said)


def check_network(
    tensors: Mapping[str, Tensor],
    file: str,
    inspect: Inspector | None = None,
    ranks: Iterable[int] | None = None,
) -> NetworkCheck:
    """The same for tensors in memory; ``file`` is what the report calls them.

    ``ranks``: those of all modules, if the caller knows more than the pairs tell.
    """
    modules = sorted({key.partition(".")[0] for key in tensors})
    norms = (inspect or low_rank_norms)(tensors)
    downs = {key: tensor for key, tensor in tensors.items() if key.endswith(".lora_down.weight")}
    sums: dict[str, list[float]] = defaultdict(list)
    for module in modules:
        if module in norms:
            sums[_block(module)].append(norms[module])
    return NetworkCheck(
        file=file,
        modules=len(modules),
        ranks=Counter((tensor.shape[0] for tensor in downs.values()) if ranks is None else ranks),
        blocks=tuple(BlockChange(name, len(row), sum(n * n for n in row) ** 0.5) for name, row in sums.items()),
        not_finite=tuple(key for key, tensor in tensors.items() if not is_finite(tensor)),
        unmoved=tuple(module for module in modules if norms.get(module) == 0),
        unmeasured=sum(module not in norms for module in modules),
    )


def is_finite(tensor: Tensor) -> bool:
    """True if all values are numbers, neither NaN nor infinite."""
    # torch cannot ask that of 8-bit floats
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


def low_rank_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of ``alpha/rank · up · down`` of every module that is such a pair, without forming the product."""
    norms: dict[str, float] = {}
    for key, down in tensors.items():
        module, _, name = key.partition(".")
        up = tensors.get(f"{module}.lora_up.weight")
        if name != "lora_down.weight" or up is None:
            continue
        alpha = tensors.get(f"{module}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        u, d = up.double().flatten(1), down.double().flatten(1)
        # ‖UD‖² = Σ (UᵀU) ∘ (DDᵀ)
        norms[module] = abs(scale) * float(((u.T @ u) * (d @ d.T)).sum().clamp(min=0)) ** 0.5
    return norms


def _block(module: str) -> str:
    text_encoder = _TEXT_ENCODER.match(module)
    if text_encoder:
        return f"text encoder {text_encoder['number']}".strip()
    block = _UNET_BLOCK.search(module)
    return block["block"] if block else "other"
