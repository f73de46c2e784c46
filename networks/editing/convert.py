"""Network files between the names of this program and those of other programs. Tensors stay bit for bit as they are.

Diffusers and PEFT have no tensors for alpha: ranks and alphas stand in the configuration that Diffusers reads from the
metadata, so nothing is multiplied in and the way back gives the same file again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from library.checkpoint.inspection import NetworkCheck
from library.device import save_dtype
from library.log import UserError
from library.models.spec import FAMILY_TITLES, FamilyName
from library.options.network_tools import ConvertOptions
from networks.adapter import AdapterSize
from networks.editing.addends import Addend, family_of_network, layers_of_family
from networks.editing.layers import ModelLayer
from networks.editing.report import report
from networks.kinds import read_network
from networks.weights import write_weights

logger = logging.getLogger(__name__)

PEFT_CONFIGURATION = "lora_adapter_metadata"
_LORA = frozenset({"alpha", "lora_down.weight", "lora_up.weight"})
_PEFT_NAMES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
_TEXT_ROOT = "text_model."


@dataclass(frozen=True)
class Converted:
    """The content of a file under other names."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def convert_file(options: ConvertOptions) -> NetworkCheck:
    """Convert the file that the options name, write it, and report what was written. Raises UserError."""
    target = Path(str(options.save_to))
    table, kinds = read_network(str(options.model))
    given = Addend(table, kinds)
    family = family_of_network(given)
    if options.to == "diffusers" and target.suffix.lower() != ".safetensors":
        raise UserError(
            f"--save_to {target}: Diffusers finds alphas in metadata only; the name must end in .safetensors"
        )
    if options.to == "kohya_diffusers" and family != "sdxl":
        logger.warning("%s is for %s, whose names are those of Diffusers' blocks", table.source, FAMILY_TITLES[family])
    converted = _CONVERTERS[options.to](given.named_for(layers_of_family(family)[0]), family)
    write_weights(target, converted.tensors, save_dtype(options.save_precision), converted.metadata)
    return report(target)


def to_kohya(network: Addend, family: FamilyName) -> Converted:
    """Names of this program: ``lora_unet_input_blocks_...`` for SDXL, else ``lora_unet_down_blocks_...``."""
    return _renamed(network, {})


def to_kohya_diffusers(network: Addend, family: FamilyName) -> Converted:
    """The same with Diffusers' names of the U-Net's blocks, for SDXL too."""
    layers, _ = layers_of_family(family)
    return _renamed(network, {layer.name: layer.other_names[0] for layer in layers if _has_other_blocks(layer)})


def _has_other_blocks(layer: ModelLayer) -> bool:
    return layer.part == "unet" and bool(layer.other_names)


def _renamed(network: Addend, names: Mapping[str, str]) -> Converted:
    tensors: dict[str, Tensor] = {}
    for module, own in network.table.modules.items():
        prefix = network.kinds[module].prefix
        name = f"{prefix}_{names.get(module, module).removeprefix('lora_')}"
        tensors |= {f"{name}.{tensor_name}": tensor for tensor_name, tensor in _with_alpha_as_wide(own).items()}
    metadata = {key: text for key, text in network.table.metadata.items() if key not in (PEFT_CONFIGURATION, "format")}
    return Converted(tensors, metadata)


def _with_alpha_as_wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Alphas of a configuration in the type that such files have them: that of the factors."""
    alpha, like = tensors.get("alpha"), tensors.get("lora_down.weight")
    if alpha is None or like is None or like.dtype.itemsize > alpha.dtype.itemsize:
        return {**tensors}
    narrowed = alpha.to(like.dtype)
    return {**tensors, "alpha": narrowed} if bool(narrowed == alpha) else {**tensors}


def to_diffusers(network: Addend, family: FamilyName) -> Converted:
    """Names of Diffusers and PEFT, ``unet.down_blocks.0....lora_A.weight``, and PEFT's configuration.

    Raises UserError for modules of other types than LoRA and for names that the family does not have.
    """
    layers = {layer.name: layer for layer in layers_of_family(family)[0]}
    table = network.table
    other = {name: network.kinds[name].__name__ for name, own in table.modules.items() if not own.keys() <= _LORA}
    unknown = [name for name in table.modules if name not in layers]
    if other:
        name, kind = next(iter(other.items()))
        raise UserError(
            f"{table.source}: {len(other)} layers are {kind}, first {name}; only LoRA can be given Diffusers' names"
        )
    if unknown:
        raise UserError(f"{table.source}: {FAMILY_TITLES[family]} has no layer {unknown[0]}; which model is it for?")
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, dict[str, AdapterSize]] = {}
    for name, own in table.modules.items():
        layer = layers[name]
        sizes.setdefault(layer.folder, {})[layer.path.removeprefix(_TEXT_ROOT)] = _size_of(own)
        # SD2's projections are matrices in Diffusers, and convolutions in many files
        is_matrix = family == "sd2" and layer.path.endswith((".proj_in", ".proj_out"))
        for tensor_name, peft_name in _PEFT_NAMES.items():
            tensor = own[tensor_name]
            tensors[f"{layer.folder}.{layer.path}.{peft_name}"] = tensor.flatten(1) if is_matrix else tensor
    configuration = {f"{part}.{key}": value for part, own in sizes.items() for key, value in _peft(own).items()}
    text = json.dumps(configuration, indent=2, sort_keys=True)
    return Converted(tensors, {**table.metadata, "format": "pt", PEFT_CONFIGURATION: text})


def _size_of(tensors: Mapping[str, Tensor]) -> AdapterSize:
    rank = tensors["lora_down.weight"].shape[0]
    alpha = tensors.get("alpha")
    return AdapterSize(rank, float(rank if alpha is None else alpha) or float(rank))


def _peft(sizes: Mapping[str, AdapterSize]) -> dict[str, Any]:
    """The configuration of one part: the usual rank and alpha, and the layers that have others, by path.

    PEFT compares the ends of paths, so those of text encoders fit with and without the level ``text_model.``.
    """
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in _columns(sizes))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: size.rank for path, size in sizes.items() if size.rank != rank},
        "alpha_pattern": {path: size.alpha for path, size in sizes.items() if size.alpha != alpha},
        "target_modules": sorted(sizes),
    }


def _columns(sizes: Mapping[str, AdapterSize]) -> tuple[list[int], list[float]]:
    return [size.rank for size in sizes.values()], [size.alpha for size in sizes.values()]


_CONVERTERS: Mapping[str, Callable[[Addend, FamilyName], Converted]] = {
    "kohya": to_kohya,
    "kohya_diffusers": to_kohya_diffusers,
    "diffusers": to_diffusers,
}
