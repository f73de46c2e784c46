"""Given pictures and masks are brought to the drawn size without distortion, whatever their size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.generation.pictures import drawn_size, feathered, fit, read_mask, read_picture, size_of_picture, to_tensor
from library.log import UserError

SIDES = st.integers(1, 3000)
ASKED = st.none() | st.integers(64, 2048)


@given(SIDES, SIDES, ASKED, ASKED, st.sampled_from([8, 32, 64]))
def test_drawn_sizes_are_multiples_and_what_is_asked_for(
    w: int, h: int, width: int | None, height: int | None, step: int
) -> None:
    drawn = drawn_size((w, h), width, height, step)
    assert all(side >= step and side % step == 0 for side in drawn)
    for side, asked, own in zip(drawn, (width, height), (w, h), strict=True):
        if asked is not None or (width is None and height is None):
            wanted = own if asked is None else asked
            assert wanted - step < side <= max(wanted, step)


def test_a_missing_side_follows_from_the_proportions() -> None:
    assert drawn_size((800, 600), 400, None, 8) == (400, 296)
    assert drawn_size((800, 600), None, 304, 8) == (400, 304)
    assert drawn_size((1000, 517), None, None, 32) == (992, 512)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 300), st.integers(20, 300), st.integers(1, 20), st.integers(1, 20))
@example(20, 55, 1, 7)
def test_a_circle_stays_a_circle(w: int, h: int, cells_w: int, cells_h: int) -> None:
    """Gradients along x and y keep the same steepness: nothing is stretched one way."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    x, y = (value - value.mean() for value in (x, y))
    picture = Image.fromarray(np.stack([128 + x / 4, 128 + y / 4, 0 * x], 2).round().clip(0, 255).astype(np.uint8))
    size = (cells_w * 8, cells_h * 8)
    result = np.asarray(fit(picture, size)).astype(float)
    assert result.shape[:2] == size[::-1]
    factor = max(size[0] / w, size[1] / h)
    if factor > 1 or max(w - size[0], h - size[1]) >= 32:
        for side, channel, axis in ((size[0], 0, 1), (size[1], 1, 0)):
            line = result[:, :, channel].mean(axis=1 - axis)
            assert abs((line[-1] - line[0]) - (side - 1) / factor / 4) < 2


def test_the_remainder_of_rounding_is_cut_and_the_other_pixels_stay() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (84, 100, 3), dtype=np.uint8)
    result = np.asarray(fit(Image.fromarray(pixels), (96, 80)))
    assert np.array_equal(result, pixels[2:82, 2:98])


def test_pictures_are_read_turned_and_without_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert size_of_picture(str(tmp_path / "a.jpg")) == (20, 40) == read_picture(str(tmp_path / "a.jpg")).size
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "b.png")
    assert read_picture(str(tmp_path / "b.png")).getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "c.png").write_text("no picture")
    for read in (size_of_picture, read_picture):
        with pytest.raises(UserError, match=r"c\.png"):
            read(str(tmp_path / "c.png"))


def test_eight_bit_values_survive_the_range_of_the_model() -> None:
    from library.generation.pictures import to_picture

    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(np.asarray(to_picture(to_tensor([Image.fromarray(every)]))), every)


def test_a_mask_is_cut_like_its_picture(tmp_path: Path) -> None:
    mask = Image.new("L", (100, 84))
    mask.paste(255, (30, 20, 80, 60))
    mask.save(tmp_path / "mask.png")
    read_1HW = read_mask(str(tmp_path / "mask.png"), (100, 84), (96, 80))
    assert read_1HW.shape == (1, 80, 96)
    assert torch.equal(read_1HW[0].nonzero()[[0, -1]], torch.tensor([[18, 28], [57, 77]]))
    mask.resize((200, 168)).save(tmp_path / "large.png")  # of another size, but of the same proportions
    assert read_mask(str(tmp_path / "large.png"), (100, 84), (96, 80)).shape == (1, 80, 96)
    mask.resize((100, 100)).save(tmp_path / "square.png")
    with pytest.raises(UserError, match=r"square\.png: 100x100 .* 100x84"):
        read_mask(str(tmp_path / "square.png"), (100, 84), (96, 80))


def test_the_ramp_of_a_mask_lies_on_the_drawn_side() -> None:
    mask_1HW = torch.zeros(1, 32, 32)
    mask_1HW[:, 8:24, 8:24] = 1
    soft_1HW = feathered(mask_1HW)
    assert bool((soft_1HW[mask_1HW == 0] == 0).all())
    row = soft_1HW[0, 16]
    assert row[16] == 1
    assert row[:13].diff().min() >= 0
    assert 0 < row[8] < row[9] < row[11] <= 1
    grey_1HW = torch.full((1, 8, 8), 0.5)
    assert torch.equal(feathered(grey_1HW), grey_1HW)  # no edge, no ramp
