"""Scalars for TensorBoard and wandb, through accelerate: which trackers, where, under which name, and what they may
see.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoint.privacy import without_folders
from library.log import UserError, first_line
from library.options import LogOptions
from library.options.toml_file import read_toml

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options.settings import Settings

logger = logging.getLogger(__name__)

_INSTALL = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb"}


class Trackers:
    """The trackers of a run; all methods do nothing when none was chosen.

    Made before the accelerator, which is given ``log_with`` and ``log_dir``. Raises UserError for a missing package,
    a missing ``logging_dir`` or an unreadable ``log_tracker_config``, before anything slow happens.
    """

    def __init__(self, settings: Settings, default_name: str) -> None:
        options = settings[LogOptions]
        self.log_with: tuple[str, ...] = chosen_trackers(options)
        self.log_dir: str | None = log_folder(options) if self.log_with else None
        self.name = options.log_tracker_name or default_name
        self._options = options
        self._init_kwargs = init_arguments(options, self.log_dir) if self.log_with else {}
        self._accelerator: Accelerator | None = None

    def start(self, settings: Settings, accelerator: Accelerator) -> None:
        """Open the trackers on the main process and hand them the run's options. Raises UserError."""
        if not self.log_with:
            return
        if "wandb" in self.log_with and accelerator.is_main_process:
            _log_in(self._options.wandb_api_key)
        config = config_of(settings.scrubbed_dict())
        try:
            accelerator.init_trackers(self.name, config=config, init_kwargs=self._init_kwargs)
        except Exception as error:  # arguments that one does not know, a service that does not answer, a full disk
            told = f"--log_tracker_config {given}: " if (given := self._options.log_tracker_config) else ""
            names = " and ".join(self.log_with)
            raise UserError(f"{told}{names} cannot be opened ({first_line(error)})") from error
        self._accelerator = accelerator

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Record scalars at an optimizer step, counted over the whole run. A tracker that fails does not stop the
        run.
        """
        if self._accelerator is None:
            return
        try:
            self._accelerator.log({name: float(value) for name, value in scalars.items()}, step=step)
        except Exception as error:  # the network, the disk, the service: none of them is worth a run
            logger.warning("logging of scalars failed and is switched off: %s", error)
            self._accelerator = None

    def open(self, accelerator: Accelerator) -> list[Any]:
        """The trackers that take pictures; empty on all but the main process."""
        return list(accelerator.trackers) if self.log_with and accelerator.is_main_process else []

    def finish(self) -> None:
        """Write out and close."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None


def chosen_trackers(options: LogOptions) -> tuple[str, ...]:
    """Names of the trackers; TensorBoard when only a folder is given. Raises UserError if one cannot work."""
    named = options.log_with or ("tensorboard" if options.logging_dir else None)
    names = () if named is None else ("tensorboard", "wandb") if named == "all" else (named,)
    problems = [
        f"--log_with {name}: the package {name} is not installed; run: {_INSTALL[name]}"
        for name in names
        if importlib.util.find_spec(name) is None
    ]
    if "tensorboard" in names and not options.logging_dir:
        problems.append(f"--log_with {named} needs --logging_dir, the folder for TensorBoard's files")
    if problems:
        raise UserError.of(problems)
    return names


def log_folder(options: LogOptions) -> str | None:
    """``logging_dir`` / ``log_prefix`` and the local time, as YYYYMMDDhhmmss."""
    if not options.logging_dir:
        return None
    return os.path.join(options.logging_dir, (options.log_prefix or "") + time.strftime("%Y%m%d%H%M%S"))


def init_arguments(options: LogOptions, folder: str | None) -> dict[str, Any]:
    """What each tracker is opened with, by its name. The file ``log_tracker_config`` replaces all of it."""
    if options.log_tracker_config:
        return _read_config(options.log_tracker_config)
    wandb = {"name": options.wandb_run_name, "dir": folder}
    return {"wandb": {key: value for key, value in wandb.items() if value is not None}}


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as trackers take them: numbers, flags and text; no empty values, no folders of this machine."""
    shown = {name: without_folders(value) for name, value in options.items() if value is not None}
    plain = (bool, int, float, str)
    return {name: value if isinstance(value, plain) else str(value) for name, value in shown.items()}


def _read_config(name: str) -> dict[str, Any]:
    config = read_toml(Path(name), "log_tracker_config").data
    stray = [key for key, value in config.items() if not isinstance(value, dict)]
    if stray:
        raise UserError(
            f"--log_tracker_config {name}: {', '.join(stray)} must stand in a table, [wandb] or [tensorboard]"
        )
    return config


def _log_in(key: str | None) -> None:
    """wandb takes the key from WANDB_API_KEY or its own login; the option is for those who cannot set either."""
    if key is None:
        return
    import wandb  # pyright: ignore[reportMissingImports]

    wandb.login(key=key)
