"""Read a model's parts from a Stability single file or a Diffusers folder into modules.

One resolver for all: symbolic links are followed, a regular file is a single file, a folder is a Diffusers folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoint.io import ModelFile, open_model_file, read_header
from library.checkpoint.keymap import MAX_LISTED, KeyMap, MappedFile, Row, fit_shape, raise_key_problems
from library.checkpoint.sd_keys import VAE_PREFIX, aliases, modern_vae_key, vae_rows
from library.checkpoint.tables import key_map
from library.log import UserError
from library.models import build, infer
from library.models.spec import (
    FAMILY_TITLES,
    PICKLE_STEMS,
    TEXT_PARTS,
    WEIGHT_STEMS,
    ArchitectureSpec,
    PredictionType,
    VaeSpec,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)

IGNORABLE_FOLDER_KEY = re.compile(r"position_ids$")


@dataclass(frozen=True)
class Target:
    """Where and in which type a part is wanted."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Recognised:
    """What a model is, before its weights are read. ``zero_terminal_snr``: it says that it was trained so."""

    spec: ArchitectureSpec
    prediction_type: PredictionType | None
    zero_terminal_snr: bool = False


def recognise(path: Path) -> Recognised:
    """Family, widths and prediction type of a file or folder. Raises UserError for anything else."""
    if path.is_dir():
        spec = infer.spec_of_folder(path)
        if spec.family == "sd2":  # in memory always matrices, so that adapters have one shape
            spec = replace(spec, unet=replace(spec.unet, linear_projection=True))
        return Recognised(spec, infer.prediction_of_folder(path), infer.zero_snr_of_folder(path))
    infos, metadata = read_header(path)
    spec = infer.spec_of_file(infos, str(path))
    return Recognised(spec, infer.prediction_of_file(infos, metadata), infer.zero_snr_of_file(infos))


def load_parts(path: Path, spec: ArchitectureSpec, targets: Mapping[str, Target]) -> dict[str, nn.Module]:
    """The parts named in ``targets`` (of `PART_NAMES`), filled, frozen, in eval mode."""
    if path.is_dir():
        return {name: _load_folder_part(path / name, name, spec, target) for name, target in targets.items()}
    with open_model_file(path) as file:
        table, others, unread = checked_table(file, spec, targets)
        if unread:
            logger.warning("%s: %d tensors are of no use here and not read (%s ...)", path.name, len(unread), unread[0])
        modules: dict[str, nn.Module] = {}
        for name, target in targets.items():
            module = empty_part(name, spec)
            mapped = MappedFile(file, table.part(name), others)
            modules[name] = build.fill(module, mapped.tensors(build.shapes_of(module)), target.dtype, target.device)
        return modules


def checked_table(
    file: ModelFile, spec: ArchitectureSpec, parts: Iterable[str] | None = None
) -> tuple[KeyMap, dict[str, str], list[str]]:
    """The key table of a single file, its keys that stand there under an older name (table key -> key in the file), and
    the keys that nobody reads. ``parts``: only these are needed. Raises UserError for keys that do not fit.
    """
    table = key_map(spec, file.infos)
    others = {key: actual for key, actual in aliases(file.infos).items() if key not in file.infos}
    names = (set(file.infos) - set(others.values())) | set(others)
    return table, others, table.check(names, str(file.path), parts)


def empty_part(name: str, spec: ArchitectureSpec) -> nn.Module:
    """One of `PART_NAMES` without weights, on the meta device."""
    if name == "unet":
        return build.empty_unet(spec.unet)
    if name == "vae":
        return build.empty_vae(spec.vae)
    return build.empty_text_encoder(spec.text_encoders[TEXT_PARTS.index(name)])


def check_written(path: Path, spec: ArchitectureSpec) -> list[str]:
    """Recognise a whole model that was just written (file or Diffusers folder); lines for the report.

    Raises UserError if it is not of this architecture.
    """
    found, title = recognise(path).spec, FAMILY_TITLES[spec.family]
    if found.family != spec.family or found.unet.widths != spec.unet.widths:
        raise UserError(f"{path.name}: what was written is not recognised as {title}; keep what it was made from")
    parts = (path / name for name in (*spec.text_parts, "unet", "vae"))  # what else is in a folder is not ours
    files = [path] if path.is_file() else [file for part in parts for file in sorted(part.glob("*.safetensors"))]
    count, size = sum(len(read_header(file)[0]) for file in files), sum(file.stat().st_size for file in files)
    return [f"{path.name}: {title}, {count} tensors, {size / 1e6:,.0f} MB, can be read"]


# ---- Diffusers folders


def _load_folder_part(folder: Path, name: str, spec: ArchitectureSpec, target: Target) -> nn.Module:
    module = empty_part(name, spec)
    files = weight_files(folder, WEIGHT_STEMS[name])
    tensors = folder_tensors(files, name, build.shapes_of(module))
    return build.fill(module, tensors, target.dtype, target.device)


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The weight files of a part's folder, shards too: safetensors first, full precision before half.

    ``variant``: only the files of this variant.
    """
    for name, extension in ((stem, "safetensors"), (PICKLE_STEMS[stem], "bin")):
        for kind in ("", ".fp16") if variant is None else (f".{variant}",):
            index = folder / f"{name}.{extension}.index{kind}.json"
            if index.is_file():
                return [folder / shard for shard in _shards(index)]
            file = folder / f"{name}{kind}.{extension}"
            if file.is_file():
                return [file]
    raise UserError(f"{folder} holds no weights ({stem}.safetensors was looked for): the Diffusers model is not whole")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: copy or download it again") from error


def canonical_key(part: str, key: str) -> str:
    """A key of a Diffusers folder in today's naming, with the level ``text_model.`` that files have."""
    if part == "vae":
        return modern_vae_key(key)
    return build.canonical_text_key(key) if part in TEXT_PARTS else key


def folder_tensors(
    files: Iterable[Path], part: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """(canonical key, tensor of the wanted shape) of a part's weight files in diffusers' names. Raises UserError."""
    opened = [open_model_file(path) for path in files]
    try:
        where = str(opened[0].path.parent)
        names = {
            canonical_key(part, key): (file, key)
            for file in opened
            for key in file.infos
            if not IGNORABLE_FOLDER_KEY.search(key)
        }
        raise_key_problems(sorted(set(shapes) - set(names)), sorted(set(names) - set(shapes)), where)
        wrong: list[str] = []
        for key, (file, own) in names.items():
            try:
                yield key, fit_shape(file.tensor(own), shapes[key])
            except ValueError as error:
                wrong.append(f"{own}: {error}")
        if wrong:
            raise UserError(f"{where}: {len(wrong)} tensors have a wrong shape: {'; '.join(wrong[:MAX_LISTED])}")
    finally:
        for file in opened:
            file.close()


# ---- a VAE on its own


def load_vae(path: Path, target: Target, option: str = "--vae") -> AutoencoderKL:
    """A VAE from any form: Diffusers folder or whole pipeline, whole checkpoint, bare VAE file in either naming.

    Raises UserError that names the option.
    """
    where = f"{option} {path}"
    if path.is_dir():
        return _load_vae_folder(path, where, target)
    with open_model_file(path) as file:
        keys = file.infos
        if any(key.startswith(VAE_PREFIX) for key in keys):
            return _load_vae_stability(file, where, VAE_PREFIX, target)
        if any(key.startswith("encoder.down_blocks.") for key in keys):
            return _load_vae_diffusers_file(file, where, target)
        if any(key.startswith("encoder.down.") for key in keys):
            return _load_vae_stability(file, where, "", target)
    raise UserError(f"{where}: no VAE was found in this file")


def _load_vae_folder(folder: Path, where: str, target: Target) -> AutoencoderKL:
    place = folder if (folder / "config.json").is_file() else folder / "vae"
    if not (place / "config.json").is_file():
        raise UserError(f"{where}: neither a config.json nor a folder `vae` is in it")
    config = infer.read_config(place)
    try:
        module = build.empty_vae(infer.vae_spec_of_config(config))
    except (KeyError, TypeError, ValueError) as error:
        kind = config.get("_class_name", "something unknown")
        raise UserError(
            f"{where} holds {kind}, or is damaged; a VAE of Stable Diffusion is an AutoencoderKL"
        ) from error
    files = weight_files(place, WEIGHT_STEMS["vae"])
    return build.fill(module, folder_tensors(files, "vae", build.shapes_of(module)), target.dtype, target.device)


def _load_vae_stability(file: ModelFile, where: str, prefix: str, target: Target) -> AutoencoderKL:
    try:
        spec = infer.vae_spec_of_keys(file.infos, prefix)
    except KeyError as error:
        raise UserError(f"{where}: the tensor {error.args[0]} is missing") from error
    rows = {key: Row(prefix + file_key, "vae", key, operation) for file_key, key, operation in vae_rows(spec)}
    needed = {row.file_key for row in rows.values()}
    raise_key_problems(sorted(needed - set(file.infos)), [], where)
    module = build.empty_vae(spec)
    tensors = MappedFile(file, rows, {}).tensors(build.shapes_of(module))
    return build.fill(module, tensors, target.dtype, target.device)


def _load_vae_diffusers_file(file: ModelFile, where: str, target: Target) -> AutoencoderKL:
    try:
        spec = _vae_spec_of_diffusers_keys(file.infos)
    except KeyError as error:
        raise UserError(f"{where}: the tensor {error.args[0]} is missing") from error
    module = build.empty_vae(spec)
    return build.fill(module, folder_tensors([file.path], "vae", build.shapes_of(module)), target.dtype, target.device)


def _vae_spec_of_diffusers_keys(infos: Mapping[str, Any]) -> VaeSpec:
    def count(pattern: str) -> int:
        found = {match.group(1) for key in infos if (match := re.match(pattern, key))}
        return len(found)

    levels = count(r"encoder\.down_blocks\.(\d+)\.")
    widths = tuple(infos[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"].shape[0] for level in range(levels))
    layers = count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    return VaeSpec(widths, layers, infos["post_quant_conv.weight"].shape[0])
