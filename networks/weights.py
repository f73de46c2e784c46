"""Network files and their tensors: reading (also the names of Diffusers and PEFT), grouping by module, writing."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from library.checkpoint.hashes import network_hashes
from library.checkpoint.io import open_model_file, save_pickle, save_safetensors
from library.log import UserError
from networks.targets import text_encoder_name, text_encoder_prefixes, unet_name

logger = logging.getLogger(__name__)

_OWN_KEY = re.compile(r"^(?P<prefix>lora|oft)_(?P<module>(?:unet|te\d?)_[^.]+)\.(?P<tensor>.+)$")
_BUNDLED = "bundle_emb."  # new words of textual inversion that OneTrainer and web UIs put beside the layers
_DOWN = re.compile(r"\.(?:lora_A(?:\.(?!weight$)[^.]+)?|lora\.down|lora_linear_layer\.down|lora_down)\.weight$")
_UP = re.compile(r"\.(?:lora_B(?:\.(?!weight$)[^.]+)?|lora\.up|lora_linear_layer\.up|lora_up)\.weight$")
_PROCESSOR = re.compile(r"\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<end>down|up)\.weight$")
_ALPHA = re.compile(r"\.alpha$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?$")
_STRUCTURED = re.compile(r"\.(?P<name>(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))(?:\.[^.]+)?$")
_COMPONENT = re.compile(r"^(?P<name>unet|text_encoder(?:_2)?)\.")


class NamedLayer(Protocol):
    """A layer and what it is called in files, by this program and by others."""

    @property
    def name(self) -> str:
        """Its name in our files."""
        ...

    @property
    def other_names(self) -> tuple[str, ...]:
        """Names in files of other programs."""
        ...


@dataclass(frozen=True)
class WeightTable:
    """The tensors of a network file by module name and tensor name. ``source`` is what errors call it.

    Module names begin with ``lora_`` here, whatever the prefix is that their type has in files; ``prefixes`` are those
    of the file, where it has the names of this program.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    source: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """One dictionary with the keys of a network's state dict."""
        return {f"{module}.{name}": t for module, tensors in self.modules.items() for name, t in tensors.items()}

    def named_for(self, targets: Iterable[NamedLayer]) -> WeightTable:
        """The same with the names of these layers where the file calls them by another program's names."""
        names = {other: target.name for target in targets for other in target.other_names}
        twice = sorted(other for other, name in names.items() if other in self.modules and name in self.modules)
        if twice:
            raise UserError(f"{self.source} has one layer under two names: {twice[0]} and {names[twice[0]]}")
        renamed = {names.get(module, module): tensors for module, tensors in self.modules.items()}
        prefixes = {names.get(module, module): prefix for module, prefix in self.prefixes.items()}
        return replace(self, modules=renamed, prefixes=prefixes)


def read_weights(path: str | Path) -> WeightTable:
    """Read a network file (safetensors or pickle), whatever its modules are.

    Keys of Diffusers and PEFT files are translated. Raises UserError for files that are damaged or no network at all.
    """
    with open_model_file(path) as file:
        tensors = {key: file.tensor(key) for key in file.infos}
        metadata = file.metadata
    return to_weight_table(tensors, str(path), {**_config_beside(Path(path)), **metadata})


def to_weight_table(
    tensors: Mapping[str, Tensor], source: str, metadata: Mapping[str, str] | None = None
) -> WeightTable:
    """Group tensors by module. See `read_weights`."""
    modules: dict[str, dict[str, Tensor]] = {}
    foreign: dict[str, Tensor] = {}
    prefixes: dict[str, str] = {}
    bundled = sorted({key.split(".")[1] for key in tensors if key.startswith(_BUNDLED)})
    if bundled:
        logger.warning("%s: the words that are bundled with it are left out: %s", source, ", ".join(bundled))
    for key, tensor in tensors.items():
        match = _OWN_KEY.match(key)
        if match is None:
            if not key.startswith(_BUNDLED):
                foreign[key] = tensor
        else:
            modules.setdefault(f"lora_{match['module']}", {})[match["tensor"]] = tensor
            prefixes[f"lora_{match['module']}"] = match["prefix"]
    for module, translated in _translate(foreign, metadata or {}, source).items():
        modules.setdefault(module, {}).update(translated)
    if not modules:
        raise UserError(f"{source} holds no network weights (keys such as lora_unet_....lora_down.weight)")
    return WeightTable(modules, source, metadata or {}, prefixes)


# ---- names of Diffusers and PEFT

_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w2_b")
"""Tensors whose first side is the rank."""
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def _translate(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> dict[str, dict[str, Tensor]]:
    """Modules of keys such as ``unet.down_blocks.0.attentions.0.proj_in.lora_A.weight``."""
    several = any(_without_wrapper(key).startswith("text_encoder_2.") for key in tensors)
    config = _adapter_config(metadata)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        split = _split(_without_wrapper(key))
        if split is None:
            raise UserError(f"{source}: {key} is no key of a LoRA file that this program knows")
        path, tensor_name = split
        component = _COMPONENT.match(path)
        name = component["name"] if component else "unet"
        inner = path[component.end() :] if component else path
        module = modules.setdefault(_own_name(name, inner, several), {})
        # PEFT has the magnitudes of a convolution as (1, O, 1, 1), which would be taken for those of inputs
        module[tensor_name] = tensor.flatten() if tensor_name == "dora_scale" else tensor
        if tensor_name in _RANKED:
            alpha = _configured_alpha(config, name, inner, rank=tensor.shape[0])
            if alpha is not None:
                module.setdefault("alpha", torch.tensor(alpha))
        elif tensor_name == "lokr_w1":
            module[tensor_name] = tensor * _scale_of_whole_blocks(config, name, inner, tensors, key)
    return modules


def _without_wrapper(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _split(key: str) -> tuple[str, str] | None:
    """(path of the layer, own name of the tensor)."""
    old = _PROCESSOR.search(key)
    if old is not None:
        layer = "to_out.0" if old["layer"] == "to_out" else old["layer"]
        return f"{key[: old.start()]}.{layer}", f"lora_{old['end']}.weight"
    structured = _STRUCTURED.search(key)
    if structured is not None:
        return key[: structured.start()], structured["name"]
    ends = {_DOWN: "lora_down.weight", _UP: "lora_up.weight", _ALPHA: "alpha", _MAGNITUDE: "dora_scale"}
    for pattern, name in ends.items():
        match = pattern.search(key)
        if match is not None:
            return key[: match.start()], name
    return None


def _own_name(component: str, path: str, several_encoders: bool) -> str:
    if component == "unet":
        return unet_name(path)
    prefixes = text_encoder_prefixes(2 if several_encoders else 1)
    return text_encoder_name(prefixes[1 if component == "text_encoder_2" else 0], path)


def _adapter_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration that Diffusers stores as JSON, with keys such as ``unet.lora_alpha``."""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        loaded = json.loads(text)
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _config_beside(path: Path) -> dict[str, str]:
    """The configuration that PEFT itself saves beside a file, in the form that `_adapter_config` reads."""
    config = path.with_name("adapter_config.json")
    if path.name not in _PEFT_FILES or not config.is_file():
        return {}
    try:
        loaded = json.loads(config.read_text("utf-8"))
    except ValueError:
        return {}
    named = {f"unet.{key}": value for key, value in loaded.items()} if isinstance(loaded, dict) else {}
    return {"lora_adapter_metadata": json.dumps(named)}


def _configured_alpha(config: Mapping[str, Any], component: str, path: str, rank: int) -> float | None:
    """Alpha of a layer in PEFT's configuration; None if it says nothing (then alpha is the rank)."""
    alpha = _of_layer(config, component, path, "alpha_pattern", ("lora_alpha", "alpha"))
    if alpha is None:
        return None
    # rank-stabilised LoRA scales by alpha/sqrt(rank)
    return float(alpha) * (rank**0.5 if config.get(f"{component}.use_rslora") else 1.0)


def _scale_of_whole_blocks(
    config: Mapping[str, Any], component: str, path: str, tensors: Mapping[str, Tensor], key: str
) -> float:
    """What the first of two whole LoKr blocks is multiplied with: PEFT scales them by alpha/rank, LyCORIS does not."""
    alpha = _of_layer(config, component, path, "alpha_pattern", ("alpha",))
    rank = _of_layer(config, component, path, "rank_pattern", ("r",))
    if key.replace("lokr_w1", "lokr_w2") not in tensors or alpha is None or not rank:
        return 1.0
    return float(alpha) / float(rank)


def _of_layer(config: Mapping[str, Any], component: str, path: str, pattern: str, plain: tuple[str, ...]) -> Any:
    """A value of PEFT's configuration for one layer: that of the first name that fits, else the plain one."""
    patterns = config.get(f"{component}.{pattern}") or {}
    named = next((value for name, value in patterns.items() if path == name or path.endswith(f".{name}")), None)
    values = [named, *(config.get(f"{component}.{name}") for name in plain)]
    return next((value for value in values if value is not None), None)


# ---- writing


def file_tensors(modules: Mapping[str, Mapping[str, Tensor]], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The keys of a file for modules by name; ``prefixes`` are those of their types."""
    return {
        f"{prefixes[module]}_{module.removeprefix('lora_')}.{name}": tensor
        for module, tensors in modules.items()
        for name, tensor in tensors.items()
    }


def write_weights(
    path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write a network file whole or not at all: safetensors by that extension, else a pickled state dict.

    ``dtype`` is what all tensors (alpha too) are cast to. Safetensors files carry ``metadata`` and the ``sshs_*``
    hashes of the bytes that are written; pickles have no place for them.
    """
    if Path(path).suffix.lower() == ".safetensors":
        save_safetensors(path, tensors, network_hashes(tensors, metadata or {}, dtype), dtype)
    else:
        save_pickle(path, tensors, dtype)
