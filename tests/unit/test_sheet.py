"""Contact sheets: every picture at its place, small ones enlarged without invented colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

from library.generation.grid import LABEL_PX, MARGIN_PX, Sheet

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(side_px: int) -> Image.Image:
    """Left half red, right half blue."""
    picture = Image.new("RGB", (side_px, side_px), RED)
    picture.paste(BLUE, (side_px // 2, 0, side_px, side_px))
    return picture


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def test_small_pictures_are_enlarged_by_whole_factors() -> None:
    for side_px, shown_px in ((16, 128), (48, 96), (64, 128), (65, 65), (256, 256), (512, 256)):
        sheet = Sheet()
        sheet.add("row", "column", halves(side_px))
        drawn = sheet.draw()
        assert drawn.width == LABEL_PX + shown_px + MARGIN_PX
        if side_px <= 256:  # larger ones are made smaller, with a soft edge
            assert abs(count(drawn, RED) + count(drawn, BLUE) - shown_px**2) == 0


def test_absent_pictures_leave_their_place_empty() -> None:
    sheet = Sheet()
    sheet.add("a", "1", Image.new("RGB", (128, 128), RED))
    sheet.add("b", "2", Image.new("RGB", (128, 128), BLUE))
    pixels = np.asarray(sheet.draw())
    rows = {colour: np.nonzero((pixels == colour).all(axis=-1)) for colour in (RED, BLUE)}
    assert rows[RED][0].max() < rows[BLUE][0].min()
    assert rows[RED][1].max() < rows[BLUE][1].min()
