"""Torch pickles, read so that nothing in them is run: with ``weights_only``, and empty shells for what is no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.log import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Classes that trainers left in the bookkeeping of old checkpoints beside the tensors. They are replaced by an empty
# shell, never imported, so no code of theirs runs.
_INERT_PREFIXES = (
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "omegaconf."),
    "torch.nn.modules.container.ParameterDict",
)


class _Shell(dict[Any, Any]):
    """Stands in for an object of a pickle; of a ParameterDict (old embedding files) it keeps the tensors."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.update(state.get("_parameters", {}) if isinstance(state, dict) else {})


def tensors_of_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled model file by name; wrappers around them are taken off. Raises UserError."""
    import torch

    loaded = read_pickle(path)
    for wrapper in ("state_dict", "string_to_param"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no state dict, it is not a model file")
    return {str(key): value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def read_pickle(path: Path) -> Any:
    """What a torch pickle holds, tensors mapped from the file; nothing in it is run. Raises UserError."""
    import pickle

    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    mapped = _is_zip(path)
    try:
        unknown = get_unsafe_globals_in_checkpoint(path) if mapped else []
        shells = [(_Shell, name) for name in unknown if name.startswith(_INERT_PREFIXES)]
        with safe_globals(shells):  # pyright: ignore[reportArgumentType] (pairs are allowed since torch 2.6)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if any(word in str(error).lower() for word in ("global", "unsupported class", "allowlist")):
            raise UserError(
                f"{path} is a pickle that could run code on loading, so it is refused; "
                "ask for a .safetensors version of the model"
            ) from error
        raise UserError(f"{path} is not a readable model file: copy or download it again") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged or cut short: copy or download it again") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
