"""Contact sheets: many pictures on one, with what differs written beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

CELL_PX = 256
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
        width = max((cell.width for cell in self.cells.values()), default=CELL_PX)
        height = max((cell.height for cell in self.cells.values()), default=CELL_PX)
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
                if (row, column) in self.cells:
                    sheet.paste(self.cells[row, column], (LABEL_PX + number * (width + MARGIN_PX), y))
        return sheet


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
