"""Which pictures a tool works on: the rule of training, for one folder or a whole tree."""

from __future__ import annotations

import os
from pathlib import Path

from library.data.index import image_names, read_folder
from library.data.records import ImageProblem, Size
from library.log import UserError


def find_images(folder: str, recursive: bool = False) -> list[Path]:
    """The images of a folder, in natural order, folder by folder; hidden files and folders are passed over.

    Paths begin with ``folder`` as given. Raises UserError if there is no such folder, or not one image.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    found: list[Path] = []
    for place in _folders(root) if recursive else [root]:
        try:
            found += [place / name for name in image_names(str(place))]
        except OSError as error:
            raise UserError(f"{place}: the folder cannot be read ({error.strerror or error})") from error
    if not found:
        raise UserError(
            f"{folder}: there are no images in the folder{'' if recursive else '; --recursive goes deeper'}"
        )
    return found


def measure_images(folder: str, recursive: bool = False) -> tuple[list[tuple[Path, Size]], list[ImageProblem]]:
    """The images that `find_images` finds with their sizes, and those of no use. Raises UserError."""
    images = find_images(folder, recursive)
    measured: list[tuple[Path, Size]] = []
    problems: list[ImageProblem] = []
    for place in dict.fromkeys(image.parent for image in images):
        content = read_folder(str(place), ())
        measured += [(place / name, size) for name, size in content.images.items()]
        problems += content.bad_images.values()
    return measured, problems


def image_key(path: Path, full_path: bool) -> str:
    """The key of an image in a metadata file: the whole path as found, or the name without its last suffix."""
    return str(path) if full_path else path.stem


def with_extension(image: Path, extension: str) -> Path:
    """The text file beside an image; ``extension`` with its dot."""
    return image.with_name(image.stem + extension)


def read_text(path: Path) -> str:
    """A text file, UTF-8 with or without a mark in front, stripped. Raises ValueError saying why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _folders(root: Path) -> list[Path]:
    found: list[Path] = []
    for place, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.append(Path(place))
    return found
