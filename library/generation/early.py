"""What is wrong with a command line whatever the model is: told before seconds or minutes of loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from library.generation.grid import with_grid_networks
from library.generation.highres import find_upscaler
from library.generation.jobs import defaults_of
from library.generation.networks import read_requests
from library.log import UserError
from library.options.generation import GenNetworkOptions, HighresOptions
from library.options.settings import Settings
from library.plugin import load_network_module

_FILES = ("textual_inversion_embeddings", "XTI_embeddings", "hypernetwork_weights", "vgg16_weights", "from_module")


def check_before_loading(settings: Settings) -> None:
    """Raise UserError with all problems of files, lists and texts of the options; the model is not looked at."""
    checks: tuple[Callable[[Settings], object], ...] = (_files, _networks, _unsharp, _upscaler)
    problems: list[str] = []
    for check in checks:
        try:
            check(settings)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError.of(problems)


def _files(settings: Settings) -> None:
    named = [(name, settings.value_of(name) or ()) for name in _FILES]
    listed = [(name, file) for name, files in named for file in ([files] if isinstance(files, str) else files)]
    missing = [(name, file) for name, file in listed if not Path(file).expanduser().is_file()]
    if missing:
        raise UserError.of(f"--{name} {file}: there is no such file" for name, file in missing)


def _networks(settings: Settings) -> None:
    with_grid, _ = with_grid_networks(settings)
    for request in read_requests(with_grid[GenNetworkOptions]):
        load_network_module(request.module)


def _unsharp(settings: Settings) -> None:
    defaults_of(settings, usual_size=0, size_step=1)


def _upscaler(settings: Settings) -> None:
    find_upscaler(settings[HighresOptions])
