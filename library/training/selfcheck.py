"""After training: read the saved network again and say what is in it, so that a file without effect is noticed at once.

Works on the file's tensors alone. Pairs ``lora_down``/``lora_up`` are understood here; a network module of another kind
may offer ``inspect_weights(tensors) -> {module name: norm of its weight change}``, and ``change_title() -> str`` if its
numbers are of something else.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.checkpoint.io import open_model_file
from library.log import UserError
from library.models.spec import FAMILY_TITLES, ArchitectureSpec

WEIGHT_CHANGE = "norm of the weight change"
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
    """What a saved network file holds. ``ranks`` counts modules by rank; ``unmoved`` modules change nothing."""

    file: str
    modules: int
    ranks: Mapping[int, int]
    blocks: tuple[BlockChange, ...]
    not_finite: tuple[str, ...]
    unmoved: tuple[str, ...]
    unmeasured: int
    title: str = WEIGHT_CHANGE

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
            found.append(f"{self.file}: no layer moved, the network has no effect; was the learning rate 0?")
        elif self.unmoved:
            found.append(f"{self.file}: {len(self.unmoved)} layers did not move, first {self.unmoved[0]}")
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
        return text + self.problems


def check_network_file(path: str | Path, inspect: Inspector | None = None, title: str = WEIGHT_CHANGE) -> NetworkCheck:
    """Read a saved network and measure it; ``title`` says what ``inspect`` measures.

    Raises UserError if the file cannot be read.
    """
    with open_model_file(path) as file:
        tensors = {key: file.tensor(key) for key in file.infos}
    return check_network(tensors, Path(path).name, inspect, title)


def check_model(path: Path, spec: ArchitectureSpec) -> list[str]:
    """Recognise a whole model that was just saved (file or Diffusers folder); lines for the report.

    Raises UserError if it is not what was trained.
    """
    from library.models.load import recognise

    found = recognise(path).spec
    if found.family != spec.family or found.unet.widths != spec.unet.widths:
        raise UserError(f"{path.name}: the saved model is not recognised as what was trained; keep the training state")
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return [f"{path.name}: {FAMILY_TITLES[found.family]}, {size / 1e6:,.0f} MB, can be read"]


def check_network(
    tensors: Mapping[str, Tensor], file: str, inspect: Inspector | None = None, title: str = WEIGHT_CHANGE
) -> NetworkCheck:
    """The same for tensors in memory; ``file`` is what the report calls them."""
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
        ranks=Counter(tensor.shape[0] for tensor in downs.values()),
        blocks=tuple(BlockChange(name, len(row), sum(n * n for n in row) ** 0.5) for name, row in sums.items()),
        not_finite=tuple(key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())),
        unmoved=tuple(module for module in modules if norms.get(module) == 0),
        unmeasured=sum(module not in norms for module in modules),
        title=title,
    )


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
