"""Contact sheets: many pictures on one, with what differs written beside them."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.generation.jobs import Job
from library.log import UserError
from library.options.generation import GenNetworkOptions, OutputOptions
from library.options.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

CELL_PX = 256
SMALL_CELL_PX = 128
MARGIN_PX = 8
LABEL_PX = 160
MOST_CELLS = 400


@dataclass
class Sheet:
    """Collects pictures by row and column; both appear in the order of their first picture."""

    rows: list[str] = field(default_factory=list[str])
    columns: list[str] = field(default_factory=list[str])
    cells: dict[tuple[str, str], Image] = field(default_factory=dict[tuple[str, str], "Image"])

    def add(self, row: str, column: str, picture: Image) -> None:
        """Take a picture, made small at once; more than `MOST_CELLS` are left out."""
        if len(self.cells) >= MOST_CELLS:
            return
        small = picture.copy()
        small.thumbnail((CELL_PX, CELL_PX))
        if row not in self.rows:
            self.rows.append(row)
        if column not in self.columns:
            self.columns.append(column)
        self.cells[row, column] = small

    def draw(self) -> Image:
        """The sheet: a line of column labels, then for each row its label and its pictures."""
        from PIL import Image as PilImage
        from PIL import ImageDraw, ImageFont

        font = ImageFont.load_default(size=14)
        cells = enlarged(self.cells)
        width = max((cell.width for cell in cells.values()), default=CELL_PX)
        height = max((cell.height for cell in cells.values()), default=CELL_PX)
        top = MARGIN_PX + _text_height(self.columns, width, font)
        size = (LABEL_PX + len(self.columns) * (width + MARGIN_PX), top + len(self.rows) * (height + MARGIN_PX))
        sheet = PilImage.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        for index, column in enumerate(self.columns):
            place = (LABEL_PX + index * (width + MARGIN_PX), MARGIN_PX // 2)
            pen.multiline_text(place, wrapped(column, width, font), fill="black", font=font)
        for index, row in enumerate(self.rows):
            y = top + index * (height + MARGIN_PX)
            text = wrapped(row, LABEL_PX - 2 * MARGIN_PX, font, most_lines=height // 18)
            pen.multiline_text((MARGIN_PX, y), text, fill="black", font=font)
            for number, column in enumerate(self.columns):
                if (row, column) in cells:
                    sheet.paste(cells[row, column], (LABEL_PX + number * (width + MARGIN_PX), y))
        return sheet


def enlarged(cells: dict[tuple[str, str], Image]) -> dict[tuple[str, str], Image]:
    """Small pictures of small models, all by one whole factor, so that one sees something; others as they are."""
    largest = max((max(cell.size) for cell in cells.values()), default=CELL_PX)
    factor = max(1, SMALL_CELL_PX // largest)
    if factor == 1:
        return cells
    return {
        place: cell.resize((cell.width * factor, cell.height * factor), resample=0)  # nearest: no invented pixels
        for place, cell in cells.items()
    }


def _text_height(texts: Sequence[str], width: int, font: object) -> int:
    return 18 * max((wrapped(text, width, font).count("\n") + 1 for text in texts), default=1)


def wrapped(text: str, width_px: int, font: object, most_lines: int = 3) -> str:
    """The text in lines that fit, cut with ``...`` where there are too many."""
    measure = font.getlength  # type: ignore[attr-defined]
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if measure(candidate) <= width_px or not lines[-1]:
            lines[-1] = candidate
        else:
            lines.append(word)
    lines = [_cut(line, width_px, font) for line in lines]
    return "\n".join(lines if len(lines) <= most_lines else [*lines[: most_lines - 1], "..."])


def _cut(line: str, width_px: int, font: object) -> str:
    measure = font.getlength  # type: ignore[attr-defined]
    if measure(line) <= width_px:
        return line
    while line and measure(f"{line}...") > width_px:
        line = line[:-1]
    return f"{line}..."


@dataclass
class NetworkGrid:
    """Draws each picture once for every network file and strength; ``names`` are the last of the live networks."""

    names: Sequence[str]
    weights: Sequence[float]
    _labels: dict[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])

    def jobs(self, jobs: Sequence[Job], number: int) -> list[Job]:
        """The jobs of a line, numbered from ``number``: all strengths of the first file, then of the next."""
        made: list[Job] = []
        for job in jobs:
            own = job.shared.multipliers[: len(job.shared.multipliers) - len(self.names)]
            for index, name in enumerate(self.names):
                for weight in self.weights:
                    only = tuple(weight if place == index else 0.0 for place in range(len(self.names)))
                    shared = replace(job.shared, multipliers=(*own, *only))
                    self._labels[number + len(made)] = (f"{name}, seed {job.seed}: {job.prompt}", f"{weight:g}")
                    made.append(replace(job, number=number + len(made), shared=shared))
        return made

    def labels(self, job: Job) -> tuple[str, str]:
        """Row and column of a picture."""
        return self._labels[job.number]


def read_weights(text: str | None) -> tuple[float, ...]:
    """The numbers of ``--grid_weights``; 1 when absent. Raises UserError."""
    try:
        return tuple(float(part) for part in (text or "1").split(","))
    except ValueError:
        raise UserError(f"--grid_weights {text}: must be numbers separated by commas (0,0.5,1)") from None


def grid_files(patterns: Sequence[str]) -> list[str]:
    """The network files that names and patterns mean, in the order of their names. Raises UserError."""
    found: list[str] = []
    for pattern in patterns:
        files = sorted(glob.glob(os.path.expanduser(pattern)))
        if not files:
            raise UserError(f"--grid_networks {pattern}: there is no such file")
        found += files
    return found


def with_grid_networks(settings: Settings) -> tuple[Settings, NetworkGrid | None]:
    """Settings whose networks are also those of ``--grid_networks``, each at 0 until its turn; and the grid."""
    output, networks = settings[OutputOptions], settings[GenNetworkOptions]
    if not output.grid_networks:
        return settings, None
    if networks.network_module:
        raise UserError("--grid_networks: the files say what they are; leave out --network_module")
    own = networks.network_weights or []
    files = grid_files(output.grid_networks)
    values = {
        **settings.as_flat_dict(),
        "network_weights": [*own, *files],
        "network_mul": [*[*(networks.network_mul or ()), *[1.0] * len(own)][: len(own)], *[0.0] * len(files)],
        "network_merge": False,
        "network_merge_n_models": (len(own) if networks.network_merge else networks.network_merge_n_models) or None,
    }
    sources = {name: settings.source_of(name) for name in values if settings.given(name)}
    sources |= dict.fromkeys(("network_weights", "network_mul"), "--grid_networks")
    grid = NetworkGrid([Path(file).stem for file in files], read_weights(output.grid_weights))
    return Settings(settings.script, values, sources), grid
