"""Previews as files: their names, the newest of each kind, and one sheet of all prompts over the course of the run."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoint.io import atomic_path
from library.generation.grid import Sheet
from library.generation.prompts import PromptSpec

if TYPE_CHECKING:
    from PIL.Image import Image

START = "e000000"
MOST_COLUMNS = 8


class PreviewFiles:
    """The previews of one run: pictures in the folder ``sample`` of ``output_dir``, their sheet beside it."""

    def __init__(self, output_dir: Path, output_name: str | None) -> None:
        self._folder = output_dir / "sample"
        self._stem = stem = f"{output_name}_" if output_name else ""
        self._sheet = output_dir / f"{stem}previews.png"
        self._name = re.compile(re.escape(stem) + r"(e?\d{6})_(\d{2,})_\d{14}(_-?\d+)?\.png")
        self._since = time.time()

    def include_earlier(self) -> None:
        """The run is a resumed one: pictures of its first part belong to it."""
        self._since = 0.0

    def write(self, picture: Image, index: int, seed: int | None, moment: str) -> Path:
        """Write a picture of prompt ``index``; the file."""
        stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
        ending = "" if seed is None else f"_{seed}"
        return save(picture, self._folder / f"{self._stem}{moment}_{index:02d}_{stamp}{ending}.png")

    def newest(self) -> dict[str, dict[int, Path]]:
        """The newest file of this run for each moment and prompt, the moments in the order of time."""
        found: dict[str, dict[int, Path]] = {}
        dated = [(file.stat().st_mtime, file) for file in self._folder.glob("*.png")]
        for _, file in sorted(entry for entry in dated if entry[0] >= self._since - 1):
            match = self._name.fullmatch(file.name)
            if match:
                found.setdefault(match[1], {})[int(match[2])] = file
        return found

    def write_sheet(self, prompts: Sequence[PromptSpec]) -> Path:
        """Write the sheet: a row for each prompt, a column for each moment (some of them if there are many)."""
        from PIL import Image as PilImage

        pictures = self.newest()
        moments = spread(list(pictures), MOST_COLUMNS)
        sheet = Sheet(columns=[in_words(moment) for moment in moments])  # also where the first prompt has no picture
        for index, prompt in enumerate(prompts):
            for moment in moments:
                if index in pictures[moment]:
                    with PilImage.open(pictures[moment][index]) as picture:
                        sheet.add(f"{index + 1}. {prompt.prompt}", in_words(moment), picture.convert("RGB"))
        return save(sheet.draw(), self._sheet)


def save(picture: Image, file: Path) -> Path:
    """Write a PNG file, whole or not at all; the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        picture.save(temporary, format="PNG")
    return file


def in_words(moment: str) -> str:
    """What a moment in a file name means."""
    if moment == START:
        return "before training"
    return f"epoch {int(moment[1:])}" if moment.startswith("e") else f"step {int(moment)}"


def spread(moments: Sequence[str], most: int) -> list[str]:
    """At most ``most`` (two or more), the first and the last among them, evenly spread."""
    if len(moments) <= most:
        return list(moments)
    return [moments[round(index * (len(moments) - 1) / (most - 1))] for index in range(most)]
