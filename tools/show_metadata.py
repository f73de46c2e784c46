"""Show the metadata of a safetensors file, or change them without touching its tensors.

``python tools/show_metadata.py --model lora.safetensors``
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.log import UserError
from library.options.network_tools import MetadataToolOptions
from library.options.scripts import SHOW_METADATA
from library.options.settings import Settings
from library.options.values import split_pair

logger = logging.getLogger(__name__)

# Without these a file would be read wrongly: the alphas of Diffusers' and PEFT's files stand in the second one.
_NEEDED_TO_READ = ("format", "lora_adapter_metadata")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises UserError for other files."""
    from library.checkpoint.io import is_safetensors, read_header

    if not is_safetensors(path):
        raise UserError(f"{path} is no safetensors file; only those have metadata")
    return read_header(path)[1]


def as_json(metadata: Mapping[str, str], parsed: bool = False) -> str:
    """The metadata as sorted, indented JSON. ``parsed``: values that are JSON objects or lists become such."""
    values = {key: _unfolded(value) for key, value in metadata.items()} if parsed else dict(metadata)
    return json.dumps(values, indent=4, sort_keys=True, ensure_ascii=False)


def _unfolded(value: str) -> object:
    try:
        loaded = json.loads(value)
    except ValueError:
        return value
    return loaded if isinstance(loaded, dict | list) else value


def stripped(metadata: Mapping[str, str]) -> dict[str, str]:
    """What training writes with ``no_metadata``: the entries that programs need to use the file."""
    from library.training.metadata import MINIMAL_KEYS

    kept = (*MINIMAL_KEYS, *_NEEDED_TO_READ)
    return {key: value for key, value in metadata.items() if key in kept or key.startswith(("modelspec.", "sshs_"))}


def edited(metadata: Mapping[str, str], options: MetadataToolOptions) -> dict[str, str]:
    """The metadata after all edits, in this order: from_json, strip, remove, set. Raises UserError."""
    result = _from_json(options.from_json) if options.from_json else dict(metadata)
    if options.strip:
        result = stripped(result)
    missing = [key for key in options.remove or () if key not in metadata and key not in result]
    if missing:
        raise UserError.of(f"--remove {key}: {options.model} has no such entry" for key in missing)
    result = {key: value for key, value in result.items() if key not in (options.remove or ())}
    return result | dict(split_pair(pair) for pair in options.set or ())


def _from_json(path: str) -> dict[str, str]:
    try:
        loaded = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--from_json {path}: cannot be read as JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"--from_json {path}: must hold an object of keys and texts")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in loaded.items()}


def _work(settings: Settings) -> int:
    from library.checkpoint.rewrite import rewrite_metadata

    options = settings[MetadataToolOptions]
    source = str(options.model)
    before = read_metadata(source)
    edits = options.strip or options.from_json or options.remove or options.set or options.save_to
    if not edits:
        print(as_json(before, options.parsed))
        return 0
    target = options.save_to or source
    after = edited(before, options)
    done = rewrite_metadata(source, target, after)
    for word, keys in (
        ("removed", before.keys() - done.metadata.keys()),
        ("added", done.metadata.keys() - before.keys()),
        ("changed", {key for key, value in before.items() if done.metadata.get(key, value) != value}),
    ):
        if keys:
            logger.info("%s: %s", word, ", ".join(sorted(keys)))
    logger.info("%s: %d entries; SHA-256 of its tensors, unchanged: %s", target, len(done.metadata), done.sha256)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Show or edit; returns the exit status."""
    return run_command(SHOW_METADATA, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
