"""Network files that are to be added together or to a model: read, named alike, with their strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.checkpoint.modelspec import title_of
from library.log import UserError
from library.models.spec import FAMILY_TITLES, SD1, SD2, SDXL, ArchitectureSpec, FamilyName
from library.options.values import argument_list
from networks.adapter import Adapter
from networks.block_weights import BlockLayout
from networks.editing.layers import ModelLayer, layout_of, model_layers
from networks.kinds import read_network, require_finite
from networks.strengths import ARGUMENTS, PartStrengths, read_strengths
from networks.weights import WeightTable

PUBLISHED: Mapping[FamilyName, ArchitectureSpec] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
_VERSIONS: Mapping[FamilyName, str] = {"sdxl": "sdxl", "sd2": "sd_v2", "sd1": "sd_v1"}
"""What ``ss_base_model_version`` begins with."""
_TEXT_INPUT = "_attn2_to_k"


@dataclass(frozen=True)
class Addend:
    """A network and how strong it is to be. ``kinds``: the type of each of its modules."""

    table: WeightTable
    kinds: Mapping[str, type[Adapter]]
    ratio: float = 1.0
    strengths: PartStrengths = field(default_factory=PartStrengths)

    @property
    def title(self) -> str:
        """What the metadata of a merged file call it."""
        return title_of(self.table.metadata, Path(self.table.source).stem)

    def named_for(self, layers: Sequence[ModelLayer]) -> Addend:
        """The same with the names of these layers where the file has those of another program."""
        table = self.table.named_for(layers)
        names = dict(zip(self.table.modules, table.modules, strict=True))
        return replace(self, table=table, kinds={names[module]: kind for module, kind in self.kinds.items()})

    def strength_of(self, layer: ModelLayer) -> float:
        """The factor of its weight difference in one layer."""
        return self.ratio * self.strengths.of(layer)


def read_addends(files: Sequence[str], ratios: Sequence[float] | None) -> list[Addend]:
    """The networks of ``--models`` with their ``--ratios``, 1 if there are none. Raises UserError."""
    if not files:
        raise UserError("--models: name the network files to merge")
    if ratios is not None and len(ratios) != len(files):
        raise UserError(f"--ratios has {len(ratios)} numbers for {len(files)} files of --models; give one for each")
    tables = [read_network(file) for file in files]
    for table, _ in tables:
        require_finite(table)
    values = ratios or [1.0] * len(files)
    return [Addend(table, kinds, ratio) for (table, kinds), ratio in zip(tables, values, strict=True)]


def with_block_weights(addends: Sequence[Addend], given: Sequence[str] | None, layout: BlockLayout) -> list[Addend]:
    """The networks with the strengths of ``--block_weights``: ``unet_mul=0.5;block_mul=...`` or the blocks' numbers
    alone, one text for each network. Raises UserError."""
    texts = given or []
    if len(texts) > len(addends):
        raise UserError(f"--block_weights has {len(texts)} entries for {len(addends)} files of --models")
    found: list[Addend] = []
    for index, addend in enumerate(addends):
        text = texts[index].strip() if index < len(texts) else ""
        pairs = argument_list(text if "=" in text else f"block_mul={text}", "block_weights") if text else {}
        unknown = sorted(pairs.keys() - {*ARGUMENTS})
        if unknown:
            raise UserError(f"--block_weights {unknown[0]}: there are {', '.join(ARGUMENTS)}")
        found.append(replace(addend, strengths=read_strengths(pairs, layout, addend.table.source, "--block_weights")))
    return found


# ---- which model a network is for


def stated_family(table: WeightTable) -> FamilyName | None:
    """The family that a file's metadata name; None if they say nothing of it."""
    said = table.metadata.get("ss_base_model_version", "")
    for family, start in _VERSIONS.items():
        if said.startswith(start):
            return family
    return None


def family_of_network(addend: Addend) -> FamilyName:
    """The family that a network was made for: by its metadata, else by names and widths that only one family has."""
    stated = stated_family(addend.table)
    if stated is not None:
        return stated
    given, of_sd1 = set(addend.table.modules), _names(SD1)
    if given & (_names(SDXL) - _names(SD2)):
        return "sdxl"
    if given & (_names(SD2) - of_sd1) or _context_width(addend) == SD2.unet.context_width:
        return "sd2"
    return "sd1"


def _names(spec: ArchitectureSpec) -> set[str]:
    return {name for layer in model_layers(spec) for name in (layer.name, *layer.other_names)}


def _context_width(addend: Addend) -> int | None:
    """Width of the text that the U-Net reads; None if the network does not tell."""
    for name, tensors in addend.table.modules.items():
        shape = addend.kinds[name].layer_shape(tensors) if name.endswith(_TEXT_INPUT) else None
        if shape is not None:
            return shape[1]
    return None


def require_family(addends: Sequence[Addend], family: FamilyName, model: str) -> None:
    """Raise UserError if the metadata of a network name another family than the model's."""
    for addend in addends:
        stated = stated_family(addend.table)
        if stated not in (None, family):
            said = addend.table.metadata["ss_base_model_version"]
            raise UserError(
                f"{addend.table.source} was made for {FAMILY_TITLES[stated]} (ss_base_model_version {said}), but "
                f"{model} is {FAMILY_TITLES[family]}"
            )


def common_family(addends: Sequence[Addend]) -> FamilyName:
    """The family that all networks were made for. Raises UserError if there are several."""
    families: list[FamilyName] = [family_of_network(addend) for addend in addends]
    for addend, family in zip(addends, families, strict=True):
        if family != families[0]:
            raise UserError(
                f"{addends[0].table.source} was made for {FAMILY_TITLES[families[0]]}, {addend.table.source} for "
                f"{FAMILY_TITLES[family]}: they cannot be merged"
            )
    return families[0]


def layers_of_family(family: FamilyName) -> tuple[tuple[ModelLayer, ...], BlockLayout]:
    """The layers of a family's published model, and how its blocks are counted."""
    spec = PUBLISHED[family]
    return model_layers(spec), layout_of(spec)
