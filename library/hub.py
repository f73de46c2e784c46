"""The Hugging Face hub: fetch models and states, upload what was saved. The network is touched only when asked for.

The endpoint is the environment variable HF_ENDPOINT, the token HF_TOKEN or, where a script has it, the option. Tokens
never appear in messages.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from library.log import UserError, first_line
from library.models.spec import PICKLE_STEMS, WEIGHT_STEMS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from library.options import HubOptions

logger = logging.getLogger(__name__)

T = TypeVar("T")
WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
MODEL_PARTS = ("text_encoder", "unet", "vae")


def _api(token: str | None = None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token or os.environ.get("HF_TOKEN") or None)


# ---- models


def files_of_model(
    names: Iterable[str], parts: Sequence[str] = MODEL_PARTS, variant: str | None = None
) -> list[str] | None:
    """Which files of a repository are needed for these parts of a Diffusers model; None if some are missing.

    Of several forms of the same weights one is taken: safetensors before pickles, full precision before fp16; or only
    the files of a ``variant``. A repository that holds nothing but a VAE has it at its root.
    """
    present = set(names)
    chosen = [name for name in ("model_index.json", "scheduler/scheduler_config.json") if name in present]
    for part in parts:
        folder = f"{part}/" if f"{part}/config.json" in present else ""
        if f"{folder}config.json" not in present or (not folder and parts != ("vae",)):
            return None
        weights = _weights(present, folder, part, ("", ".fp16") if variant is None else (f".{variant}",))
        if not weights:
            return None
        chosen += [f"{folder}config.json", *weights]
    return chosen


def _weights(present: set[str], folder: str, part: str, variants: Sequence[str]) -> list[str]:
    modern = WEIGHT_STEMS[part]
    for stem, extension in ((modern, "safetensors"), (PICKLE_STEMS[modern], "bin")):
        for variant in variants:
            single = f"{folder}{stem}{variant}.{extension}"
            if single in present:
                return [single]
            index = f"{folder}{stem}.{extension}.index{variant}.json"
            if index in present:
                start = f"{folder}{stem}{variant}-"
                shards = (name for name in present if name.startswith(start) and name.endswith(f".{extension}"))
                return [index, *sorted(shards)]
    return []


def download_model(
    repo_id: str,
    option: str,
    parts: Sequence[str] = MODEL_PARTS,
    token: str | None = None,
    variant: str | None = None,
) -> Path:
    """The local folder of a hub model: what is on this machine already, else what is fetched now.

    Only the needed files are fetched, see `files_of_model`. Raises UserError that names the option.
    """
    from huggingface_hub import snapshot_download

    local = _local_snapshot(repo_id, parts)
    if local is not None and files_of_model(_listing(local), parts, variant) is not None:
        logger.info("%s: using the copy in %s", repo_id, local)
        return local

    def fetch() -> Path:
        api = _api(token)
        logger.info("%s: no such file or folder here, asking the hub", repo_id)
        _find_host(api.endpoint)
        wanted = files_of_model(api.list_repo_files(repo_id), parts, variant)
        if wanted is None:
            what = "Diffusers model" if variant is None else f"variant {variant} of a Diffusers model"
            raise UserError(f"{option} {repo_id}: the repository has no whole {what} ({', '.join(parts)})")
        logger.info("%s: downloading %d files from the hub", repo_id, len(wanted))
        folder: Any = snapshot_download(repo_id, allow_patterns=wanted, token=api.token, endpoint=api.endpoint)
        return Path(folder)

    return _told(fetch, f"{option} {repo_id}: no such file or folder here, and it could not be fetched from the hub")


def load_pretrained(load: Callable[..., Any], name: str, option: str, example: str) -> Any:
    """What ``load`` (a ``from_pretrained`` of transformers) makes of a folder or a hub id; the copy on this machine
    comes first.

    Raises UserError that names the option, and for a file or address of another program's weights what to give
    instead (``example``).
    """
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()  # of the weights: over before it is read, and in the way of ours
    place = Path(name).expanduser()
    if place.is_file() or "://" in name or name.lower().endswith(WEIGHT_SUFFIXES):
        raise UserError(
            f"{option} {name}: a single weights file of another program is not read here; give the same model as a "
            f"folder in the form of transformers, or its hub id ({example})"
        )
    if place.is_dir():
        try:
            return load(str(place), local_files_only=True)
        except Exception as error:  # the library raises many kinds for damaged folders
            raise UserError(f"{option} {name}: it cannot be read ({first_line(error)})") from error
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{option} {name}: there is no such folder")
    try:
        return load(name, local_files_only=True)
    except Exception:  # not on this machine, or not whole: each part of the library has its own errors
        logger.info("%s: not whole on this machine, asking the hub", name)
        return _told(lambda: load(name), f"{option} {name}: no such folder here, and the hub did not give it")


def _find_host(endpoint: str) -> None:
    """Raise OSError at once if no network knows the hub's name: its client would ask for half a minute.

    A proxy finds names by itself, so with one nothing is asked here.
    """
    place = urlsplit(endpoint)
    if not getproxies():
        socket.getaddrinfo(place.hostname, place.port or place.scheme)


def _local_snapshot(repo_id: str, parts: Sequence[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    # Without patterns a snapshot that lacks files which were never asked for counts as incomplete.
    configs = ["config.json"] if parts == ("vae",) else []
    configs += [f"{part}/config.json" for part in parts]
    try:
        folder: Any = snapshot_download(repo_id, local_files_only=True, allow_patterns=configs)
    except (OSError, ValueError):  # LocalEntryNotFoundError is both, a wrong id is a ValueError
        return None
    return Path(folder)


def _listing(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _told(action: Callable[[], T], start: str) -> T:
    """Run a download; network and hub errors become one line."""
    try:
        return action()
    except UserError:
        raise
    except Exception as error:  # the client's HTTP library, and so its errors, change between versions
        raise UserError(f"{start} ({first_line(error)}); check the name, the network and HF_TOKEN") from error


def download_files(repo_id: str, names: Sequence[str], folder: Path, option: str) -> None:
    """Fetch files of a repository into a folder, whatever is there. Raises UserError that names the option."""
    from huggingface_hub import hf_hub_download

    def fetch() -> Path:
        api = _api()
        for name in names:
            logger.info("%s: fetching %s from the hub", repo_id, name)
            hf_hub_download(repo_id, name, local_dir=folder, token=api.token, endpoint=api.endpoint)
        return folder

    _told(fetch, f"{option} {repo_id}: {', '.join(names)} could not be fetched from the hub")


# ---- states


@dataclass(frozen=True, slots=True)
class HubPath:
    """A folder in a repository."""

    repo_id: str
    path: str
    revision: str | None = None
    repo_type: str | None = None


def parse_hub_path(text: str) -> HubPath:
    """``owner/name/path[:revision[:type]]``. Raises UserError for anything else."""
    place, *rest = text.split(":")
    pieces = [piece for piece in place.split("/") if piece]
    if len(pieces) < 3 or len(rest) > 2:
        raise UserError(f"--resume {text}: from the hub it must read owner/name/path[:revision[:type]]")
    revision = rest[0] or None if rest else None
    kind = (rest[1] if len(rest) == 2 else "model") if rest else None
    return HubPath("/".join(pieces[:2]), "/".join(pieces[2:]), revision, kind)


def download_state(text: str, token: str | None = None) -> Path:
    """Fetch the state folder that ``--resume`` names on the hub and return its local place."""
    from huggingface_hub import snapshot_download

    place = parse_hub_path(text)

    def fetch() -> Path:
        api = _api(token)
        names = api.list_repo_files(place.repo_id, revision=place.revision, repo_type=place.repo_type)
        wanted = [name for name in names if name.startswith(place.path + "/")]
        if not wanted:
            raise UserError(f"--resume {text}: there is no folder {place.path} in {place.repo_id}")
        folder: Any = snapshot_download(
            place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            allow_patterns=wanted,
            token=api.token,
            endpoint=api.endpoint,
        )
        return Path(folder) / place.path

    return _told(fetch, f"--resume {text}: it could not be fetched from the hub")


# ---- uploads


class Uploader:
    """Uploads saved files and folders, one after the other, in the background with ``async_upload``.

    A failed upload never stops the training: it is a warning at once and again at the end (`close`).
    """

    def __init__(self, options: HubOptions) -> None:
        if not options.huggingface_repo_id:
            raise ValueError("there is no repository to upload to")
        self._repo_id = options.huggingface_repo_id
        self._type = options.huggingface_repo_type or "model"
        self._folder = (options.huggingface_path_in_repo or "").strip("/")
        self._private = options.huggingface_repo_visibility != "public"
        self._api = _api(options.huggingface_token)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload") if options.async_upload else None
        self._running: list[Future[None]] = []
        self._exists = False
        self.failures: list[str] = []

    def check(self) -> None:
        """Make sure before training that the repository is there or can be made. Raises UserError."""
        try:
            self._create()
        except Exception as error:  # see `_told`
            raise UserError(
                f"--huggingface_repo_id {self._repo_id}: the hub does not accept uploads ({first_line(error)}); "
                "check the name and the token (HF_TOKEN)"
            ) from error

    def upload(self, path: Path, *, wait: bool = False) -> None:
        """Upload a file or a folder under its own name; ``wait`` for it, e.g. the final model."""
        if self._pool is None:
            self._upload(path)
            return
        self._running.append(self._pool.submit(self._upload, path))
        if wait:
            self._wait()

    def close(self) -> None:
        """Wait for what is still under way, and say again what failed."""
        self._wait()
        if self._pool:
            self._pool.shutdown()
        if self.failures:
            logger.warning("not uploaded to %s: %s", self._repo_id, ", ".join(self.failures))

    def _wait(self) -> None:
        for future in self._running:
            future.result()
        self._running.clear()

    def _create(self) -> None:
        if not self._exists:
            self._api.create_repo(self._repo_id, repo_type=self._type, private=self._private, exist_ok=True)
            self._exists = True

    def _upload(self, path: Path) -> None:
        place = str(PurePosixPath(self._folder) / path.name) if self._folder else path.name
        try:
            self._create()
            if path.is_dir():
                self._api.upload_folder(
                    repo_id=self._repo_id, folder_path=path, path_in_repo=place, repo_type=self._type
                )
            else:
                self._api.upload_file(
                    path_or_fileobj=path, path_in_repo=place, repo_id=self._repo_id, repo_type=self._type
                )
            logger.info("uploaded %s to %s/%s", path.name, self._repo_id, place)
        except Exception as error:  # whatever went wrong, the training goes on
            self.failures.append(path.name)
            logger.warning("%s was not uploaded to %s: %s", path.name, self._repo_id, first_line(error))
