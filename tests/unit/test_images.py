"""Decoding, fitting and augmenting pictures."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.face_names import FaceBox, face_box
from library.data.headers import measure
from library.data.images import (
    UnreadableImage,
    alpha_of,
    fit_pixels,
    read_image,
    read_pixels,
    resize,
    to_model_range,
)
from library.data.index import read_folder
from library.data.records import Augmentation, Fit
from tests.data_fixtures import cover_fit, picture

SEEDS = range(60)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn 90 degrees clockwise to show"
    return exif


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_lossless_formats_give_the_same_rgb(tmp_path: Path, form: str) -> None:
    pixels = picture((40, 24)) if form != "GIF" else np.full((24, 40, 3), (10, 200, 90), np.uint8)
    options = {"lossless": True} if form == "WEBP" else {}
    file = tmp_path / f"a.{form.lower()}"
    file.write_bytes(encoded(Image.fromarray(pixels), form, **options))
    assert np.array_equal(read_image(str(file)), pixels)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(tmp_path: Path, form: str) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left: on top after the turn
    options = {"lossless": True} if form == "WEBP" else {}
    file = tmp_path / "a.img"
    file.write_bytes(encoded(Image.fromarray(pixels), form, exif=rotated_exif(), **options))
    shown = read_image(str(file))
    assert shown.shape == (48, 16, 3)
    assert shown[:14].min() > 240
    assert shown[-14:].max() < 15


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("form", "package"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl"), ("AVIF", "PIL")], ids=["heic", "jxl", "avif"]
)
def test_photos_of_telephones_are_measured_and_turned(
    tmp_path: Path, request: pytest.FixtureRequest, form: str, package: str, orientation: int
) -> None:
    file = tmp_path / f"a.{request.node.callspec.id.split('-')[0]}"
    plug_in = pytest.importorskip(package)
    if form == "HEIF":
        plug_in.register_heif_opener()
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file.write_bytes(encoded(Image.fromarray(pixels), form, exif=exif.tobytes(), quality=95))
    shown = read_image(str(file))
    assert measure(str(file)) == (shown.shape[1], shown.shape[0]) == ((128, 64) if orientation == 1 else (64, 128))
    assert shown[:28, :28].min() > 240
    assert shown[-28:, -28:].max() < 15


def test_the_size_of_a_picture_is_not_taken_for_that_of_its_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A HEIC of a telephone is made of tiles of 512 px, whose size stands in its header too."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    monkeypatch.setattr("imagesize.get", lambda file: (512, 512))
    file = tmp_path / "a.heic"
    file.write_bytes(encoded(Image.new("RGB", (128, 64)), "HEIF"))
    assert measure(str(file)) == (128, 64)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("a.HEIC", "pillow_heif", "pillow-heif"), ("a.jxl", "pillow_jxl", "pillow-jxl-plugin")],
)
def test_a_format_that_needs_a_package_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / name
    file.write_bytes(b"whatever it is")
    found = read_folder(str(tmp_path), (".txt",))
    assert f"pip install {package}" in found.bad_images[name].reason
    with pytest.raises(UnreadableImage, match=f"a package: pip install {package}"):
        read_image(str(file))


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)  # black, wholly transparent: the reference would train on black
    pixels[0, :, 3] = 255
    pixels[1, :, 3] = 128
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(pixels, "RGBA"), "PNG"))
    assert read_image(str(file))[:, 0, 0].tolist() == [0, 127, 255, 255]


@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_palette_transparency_lies_over_white(tmp_path: Path, form: str) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 30, 30] + [0] * 762)
    image.putpixel((0, 0), 0)
    file = tmp_path / "a.img"
    file.write_bytes(encoded(image, form, transparency=0))
    shown = read_image(str(file))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[1, 1].tolist() == [200, 30, 30]


def grey_png(depth: int, rows: bytes, transparent: int) -> bytes:
    """A PNG of 4 x 2 greys of ``depth`` bits, one of which is transparent."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 4, 2, depth, 0, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "grey"),
    [
        (1, b"\x50", 0, 255),
        (2, bytes([0b01100110]), 1, 170),
        (4, bytes([0x12, 0x12]), 1, 34),
        (8, bytes([9, 7, 9, 7]), 9, 7),
        (16, struct.pack(">4H", 300, 70 * 257, 300, 70 * 257), 300, 70),
    ],
)
def test_a_transparent_grey_lies_over_white(
    tmp_path: Path, depth: int, row: bytes, transparent: int, grey: int
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(grey_png(depth, (b"\0" + row) * 2, transparent))
    assert read_image(str(file))[:, :, 1].tolist() == [[255, grey, 255, grey]] * 2
    alpha_HW = alpha_of(read_pixels(str(file)))
    assert alpha_HW is not None
    assert alpha_HW.tolist() == [[0, 255, 0, 255]] * 2


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_16_bit_is_scaled(tmp_path: Path, form: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16).repeat(2, axis=0)
    file = tmp_path / "a.img"
    file.write_bytes(encoded(Image.fromarray(values), form))
    assert read_image(str(file))[0, :, 1].tolist() == [0, 1, 128, 255]


JPEGS = {
    "plain": {},
    "fine colours": {"subsampling": 0},
    "own tables": {"optimize": True},
    "restarts": {"restart_marker_blocks": 9},
    "turned": {"exif": rotated_exif()},
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_its_end_is_refused_in_spite_of_its_end_marker(tmp_path: Path, name: str, mode: str) -> None:
    random = np.random.default_rng(1)
    image = Image.fromarray(random.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((208, 144)).convert(mode)
    data = encoded(image, "JPEG", quality=90, **JPEGS[name])
    file = tmp_path / "a.jpg"
    file.write_bytes(data)
    read_image(str(file))
    for share in (0.5, 0.7, 0.9, 0.98):
        file.write_bytes(data[: int(len(data) * share)] + b"\xff\xd9")
        with pytest.raises(UnreadableImage, match="end too early"):
            read_image(str(file))


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 1)])
def test_grey_jpegs_are_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    """A flat picture of the very grey that decoders fill up with, and one with such a corner."""
    flat = Image.new("RGB", size, (128, 128, 128))
    corner = Image.fromarray(picture(size))
    corner.paste((128, 128, 128), (size[0] // 2, size[1] // 2, *size))
    for image in (flat, corner):
        for options in ({}, {"progressive": True}, {"exif": rotated_exif()}):
            file = tmp_path / "a.jpg"
            file.write_bytes(encoded(image, "JPEG", quality=100, subsampling=0, **options))
            shown = read_image(str(file))
            assert shown[-1, -1].tolist() == [128, 128, 128] or options.get("exif")


def test_a_png_with_wrong_checksums_is_refused(tmp_path: Path) -> None:
    """Half of these can be decoded: to other pixels."""
    whole = encoded(Image.fromarray(picture((128, 32))), "PNG")
    for place in range(60, len(whole) - 30, 7):
        data = bytearray(whole)
        data[place] ^= 0x55
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(UnreadableImage, match="damaged"):
            read_image(str(tmp_path / "a.png"))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    file = tmp_path / "a.img"
    file.write_bytes(
        encoded(Image.fromarray(picture((8, 6))).convert("L" if mode == "LA" else mode).convert(mode), form)
    )
    shown = read_image(str(file))
    assert shown.shape == (6, 8, 3)
    assert shown.dtype == np.uint8
    assert shown.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6, 0.98])
def test_truncated_files_are_refused_by_name(tmp_path: Path, form: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    file = tmp_path / "cut short.img"
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UnreadableImage, match=r"cut short\.img") as caught:
        read_image(str(file))
    assert "0x" not in caught.value.reason
    assert "\n" not in str(caught.value)


def test_a_jpeg_with_a_thumbnail_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    thumbnail = encoded(Image.fromarray(picture((16, 16))), "JPEG")
    exif = b"Exif\x00\x00" + b"MM\x00*\x00\x00\x00\x08" + b"\x00\x00\x00\x00\x00\x00" + thumbnail
    data = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG", exif=exif
    )
    file = tmp_path / "a.jpg"
    file.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(UnreadableImage):
        read_image(str(file))
    file.write_bytes(data + b"bytes that some cameras append")
    assert read_image(str(file)).shape == (64, 64, 3)


def test_missing_files_and_texts_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.png"
    text.write_text("no picture")
    for path in (text, tmp_path / "absent.png", tmp_path):
        with pytest.raises(UnreadableImage, match=str(path.name)):
            read_image(str(path))


def test_names_beyond_ascii(tmp_path: Path) -> None:
    file = tmp_path / "猫 ü.png"
    Image.fromarray(picture((8, 8))).save(file)
    assert np.array_equal(read_image(str(file)), picture((8, 8)))


def test_center_cut_drops_half_of_what_is_too_much() -> None:
    image = picture((64, 40))
    fitted = fit_pixels(image, Fit((48, 40), (64, 40), (0, 0, 48, 40), 0.0))
    assert np.array_equal(fitted.pixels_HWC, image[:, 8:56])
    assert (fitted.cut.left_top, fitted.cut.flipped) == ((8, 0), False)


def test_random_crop_reports_the_cut_really_made() -> None:
    image = picture((96, 80))
    fit = Fit((64, 64), (96, 80), (0, 0, 64, 64), 0.0)
    seen: set[tuple[int, int]] = set()
    for seed in SEEDS:
        fitted = fit_pixels(image, fit, Augmentation(random_crop=True, flip_aug=True), seed)
        left, top = fitted.cut.left_top
        shown = image[:, ::-1] if fitted.cut.flipped else image
        assert np.array_equal(fitted.pixels_HWC, shown[top : top + 64, left : left + 64])
        seen.add((left, top))
    assert len(seen) > 40
    assert {fit_pixels(image, fit, Augmentation(flip_aug=True), seed).cut.flipped for seed in SEEDS} == {True, False}


def test_a_random_crop_can_be_anywhere_from_edge_to_edge() -> None:
    image, fit = picture((66, 67)), Fit((64, 64), (66, 67), (0, 0, 64, 64), 0.0)
    cuts = {fit_pixels(image, fit, Augmentation(random_crop=True), seed).cut.left_top for seed in SEEDS}
    assert cuts == {(left, top) for left in range(3) for top in range(4)}


def test_mirrored_cut_counts_from_the_mirrored_side() -> None:
    image = picture((65, 40))
    fit = Fit((48, 40), (65, 40), (0, 0, 48, 40), 0.0)
    visits = (fit_pixels(image, fit, Augmentation(flip_aug=True), seed) for seed in SEEDS)
    fitted = next(one for one in visits if one.cut.flipped)
    assert fitted.cut.left_top == (9, 0)
    assert np.array_equal(fitted.pixels_HWC, image[:, ::-1][:, 9:57])


def test_draws_depend_on_the_sample_seed_alone_and_not_on_other_options() -> None:
    image, fit = picture((96, 80)), Fit((64, 64), (96, 80), (0, 0, 64, 64), 0.0)
    both = Augmentation(random_crop=True, flip_aug=True, color_aug=True)
    for seed in range(20):
        first, second = fit_pixels(image, fit, both, seed), fit_pixels(image, fit, both, seed)
        assert np.array_equal(first.pixels_HWC, second.pixels_HWC)
        assert first.cut.flipped == fit_pixels(image, fit, Augmentation(flip_aug=True), seed).cut.flipped


def test_color_change_is_small_and_happens_in_a_third_of_the_visits() -> None:
    image, fit = picture((32, 32)), cover_fit((32, 32), (32, 32))
    plain = fit_pixels(image, fit).pixels_HWC.astype(int)
    changed = 0
    for seed in range(300):
        shown = fit_pixels(image, fit, Augmentation(color_aug=True), seed).pixels_HWC.astype(int)
        # a gamma on 0..255 values (the reference) would move bright pixels by up to 60
        assert abs(shown.mean() - plain.mean()) < 6
        changed += not np.array_equal(shown, plain)
    assert 70 < changed < 130


def test_resize_averages_when_shrinking_and_is_smooth_when_enlarging() -> None:
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(int(resize(stripes, (4, 4))[0, 0, 0]) - 127) <= 1
    step = np.zeros((4, 4, 3), np.uint8)
    step[:, 2:] = 200
    assert len(np.unique(resize(step, (16, 16))[8, :, 0])) > 4


def test_face_box_is_read_from_the_file_name_only() -> None:
    assert face_box("some_dir_1_2_3/x_0100_0050_0030_0040.png") == FaceBox((100, 50), (30, 40))
    assert face_box("a_b_c_d_e/x.png") is None  # the folder's underscores do not count
    assert face_box("x_y_10_20_30_forty.png") is None  # the reference stops here
    assert face_box("x_0000_0000_0000_0000.png") is None
    assert face_box("100_50_30_40.png") is None  # four parts only


def test_face_crop_keeps_the_face_and_covers_the_bucket() -> None:
    image = np.zeros((300, 400, 3), np.uint8)
    image[40:80, 300:340] = 255
    face = FaceBox((320, 60), (40, 40))
    rules = Augmentation(face_crop_aug_range=(2.0, 4.0))
    fit = cover_fit((400, 300), (128, 64))
    sizes: set[int] = set()
    for seed in SEEDS:
        fitted = fit_pixels(image, fit, rules, seed, face)
        assert fitted.pixels_HWC.shape == (64, 128, 3)
        share = (fitted.pixels_HWC[:, :, 0] > 127).sum()
        assert 64 / 4 - 3 <= np.sqrt(share) <= 64 / 2 + 3  # the face takes 1/4 to 1/2 of the shorter side
        sizes.add(int(share))
    assert len(sizes) > 5


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(8, 200), st.integers(8, 200)),
    st.sampled_from([(64, 64), (96, 32), (32, 128)]),
    st.tuples(st.integers(1, 250), st.integers(0, 250)),
    st.integers(1, 150),
    st.tuples(st.floats(0.5, 6), st.floats(0, 3)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_face_crop_always_fills_the_bucket(size, bucket, center, face_size, span, random_crop, seed) -> None:  # type: ignore[no-untyped-def]
    rules = Augmentation(random_crop=random_crop, face_crop_aug_range=(span[0], span[0] + span[1]), flip_aug=True)
    face = FaceBox(center, (face_size, face_size))
    fitted = fit_pixels(picture(size), cover_fit(size, bucket), rules, seed, face)
    assert fitted.pixels_HWC.shape == (bucket[1], bucket[0], 3)
    assert min(fitted.cut.left_top) >= 0


def test_model_range() -> None:
    pixels = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    tensor = to_model_range(pixels)
    assert tensor.shape == (1, 3, 1, 1)
    assert torch.allclose(tensor.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert pixels.flatten().tolist() == [0, 51, 255]
