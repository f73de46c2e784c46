"""Look into a network file: sizes of its tensors, then what the file as a whole holds."""

from __future__ import annotations

from collections.abc import Iterator

from library.checkpoint.inspection import NetworkCheck
from library.checkpoint.io import ModelFile, open_model_file
from library.options.network_tools import CheckOptions
from networks.editing.report import report

_PAIR = ("lora_up", "lora_down", ".lora_A.", ".lora_B.", ".lora.up", ".lora.down")


def check_lines(file: ModelFile, show_all_keys: bool) -> Iterator[str]:
    """The number of tensors, then for each its key, shape, mean and smallest absolute value, separated by commas."""
    keys = [key for key in file.infos if show_all_keys or any(part in key for part in _PAIR)]
    word = "tensors" if show_all_keys else "LoRA-up and LoRA-down tensors"
    yield f"number of {word}: {len(keys)}"
    for key in keys:
        sizes = file.tensor(key).float().abs()
        shape = "-".join(str(side) for side in sizes.shape)
        mean, least = (float(sizes.mean()), float(sizes.min())) if sizes.numel() else (0.0, 0.0)
        yield f"{key},({shape}),{mean},{least}"


def check_command(options: CheckOptions) -> NetworkCheck:
    """Print the list and report what the file holds. Raises UserError if it cannot be read."""
    path = str(options.file)
    with open_model_file(path) as file:
        for line in check_lines(file, options.show_all_keys):
            print(line)
    return report(path)
