"""Finding images: folders, captions, metadata files, bad files, and the memory of an earlier start."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from library.data import index
from library.data.facts import metadata_facts
from library.data.headers import BadFile, measure
from library.data.index import image_names
from library.data.records import (
    Augmentation,
    BucketRules,
    CaptionRules,
    DatasetKind,
    DatasetSpec,
    ResolvedDataset,
    SubsetSpec,
)
from library.data.report import describe
from library.data.sources import resolve
from library.data.spec import load_dataset_specs
from library.log import UserError
from library.options.data import DataOptions


def picture(path: Path, size: tuple[int, int] = (64, 48), orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, exif=exif) if orientation > 1 else Image.fromarray(noise).save(path)
    return path


def spec(*subsets: SubsetSpec, kind: DatasetKind = DatasetKind.DREAMBOOTH, **rules: Any) -> DatasetSpec:
    return DatasetSpec(kind, 1, BucketRules(rules.pop("resolution", (64, 64)), **rules), subsets)


def folder(path: Path, **fields: Any) -> SubsetSpec:
    return SubsetSpec(image_dir=str(path), **{"class_tokens": "cat", **fields})


def found(*subsets: SubsetSpec, **choices: Any) -> ResolvedDataset:
    return resolve([spec(*subsets)], **choices)[0]


def problems(*subsets: SubsetSpec, **choices: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        found(*subsets, **choices)
    return str(caught.value).split("\n")


def test_images_in_natural_order_hidden_and_other_files_passed_over(tmp_path: Path) -> None:
    for name in ("b10.png", "b9.JPG", "a.WebP", ".hidden.png", "sub/c.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "folder.png").mkdir()
    data = found(folder(tmp_path, num_repeats=3))
    assert [Path(record.path).name for record in data.records] == ["a.WebP", "b9.JPG", "b10.png"]
    assert {record.repeats for record in data.records} == {3}
    assert [fit.bucket for fit in data.fits] == [(64, 64)] * 3


def truncated(path: Path) -> None:
    data = picture(path, (200, 200)).read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def png_header(path: Path, width: int, height: int) -> None:
    """A PNG that says a size but has no pixels to speak of."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b""))


def test_bad_images_are_all_named_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "good.png")
    picture(tmp_path / "one.png", (1, 1))
    png_header(tmp_path / "huge.png", 20_000, 20_000)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is no image")
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.bmp"):
        truncated(tmp_path / name)
    lines = problems(folder(tmp_path))
    reasons = {Path(line.split(": ")[0]).name: line.split(": ", 1)[1] for line in lines}
    assert "too few" in reasons.pop("one.png")
    assert "too many" in reasons.pop("huge.png")
    assert "empty" in reasons.pop("empty.jpg")
    assert "no image of a known format" in reasons.pop("text.png")
    assert set(reasons) == {"cut.png", "cut.jpg", "cut.webp", "cut.bmp"}
    with caplog.at_level(logging.WARNING):
        data = found(folder(tmp_path), on_bad_image="skip")
    assert [Path(record.path).name for record in data.records] == ["good.png"]
    assert len(data.problems) == 8
    assert all(Path(problem.path).name in caplog.text for problem in data.problems)


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    place = tmp_path / "in"
    picture(place / "a.png")
    for name in ("b.png", "a.txt"):
        (place / name).symlink_to(tmp_path / "gone" / name)
    (place / "folder.png").mkdir()
    assert problems(folder(place)) == [
        f"{place / name}: cannot be read (No such file or directory)" for name in ("b.png", "a.txt")
    ]
    assert image_names(str(place)) == ["a.png", "b.png"]


def test_links_that_lead_in_a_circle_are_told(tmp_path: Path) -> None:
    """They spoil one file, not the folder that they lie in."""
    place = tmp_path / "1_x"
    picture(place / "a.png")
    for link in (place / "b.png", tmp_path / "2_y"):
        link.symlink_to(link)
    assert problems(folder(place)) == [f"{place / 'b.png'}: cannot be read (Too many levels of symbolic links)"]
    assert image_names(str(place)) == ["a.png", "b.png"]
    (whole,) = load_dataset_specs(DataOptions(train_data_dir=str(tmp_path), resolution=(64, 64)))
    assert [subset.image_dir for subset in whole.subsets] == [str(place)]


def test_data_behind_the_end_of_an_image_do_no_harm(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + b"\0" * 500)
    assert measure(str(path)) == (64, 48)


def test_bad_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "unused.txt").write_bytes(b"\xff")
    (line,) = problems(folder(tmp_path))
    assert "a.txt: is not UTF-8 text (byte 3)" in line
    data = found(folder(tmp_path), on_bad_caption="skip")
    assert [record.caption for record in data.records] == ["good"]


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_after_exif_orientation(extension: str, orientation: int, tmp_path: Path) -> None:
    path = picture(tmp_path / f"a.{extension}", (40, 20), orientation)
    with Image.open(path) as image:
        assert measure(str(path)) == ImageOps.exif_transpose(image).size


def test_jpeg_size_behind_a_long_profile(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 30)).save(buffer, "JPEG", icc_profile=os.urandom(60_000), progressive=True)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert measure(str(tmp_path / "a.jpg")) == (50, 30)
    with pytest.raises(BadFile, match="cannot be read"):
        measure(str(tmp_path / "none.jpg"))


def test_folder_problems_come_together(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "raw").mkdir()
    for name in ("1.DNG", "2.dng", "2.mov"):
        (tmp_path / "raw" / name).touch()
    lines = problems(folder(tmp_path / "none"), folder(tmp_path / "empty"), folder(tmp_path / "raw"))
    assert "none: the folder cannot be read (No such file or directory)" in lines[0]
    assert "empty: there are no images in the folder (its subfolders are not searched: sub)" in lines[1]
    assert "raw: there are no images in the folder (it has .dng, .mov files; images are .png .jpg" in lines[2]


def test_regularisation_alone_is_no_data_set(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert "no training images" in problems(folder(tmp_path, is_reg=True))[0]


def test_regularisation_keeps_its_own_rules(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "reg" / "b.png")
    flipped = folder(tmp_path / "reg", is_reg=True, augmentation=Augmentation(flip_aug=True))
    data = found(flipped, folder(tmp_path / "train", captions=CaptionRules(shuffle_caption=True)))
    rules = {record.is_reg: data.subset_of(record) for record in data.records}
    assert (rules[True].augmentation.flip_aug, rules[True].captions.shuffle_caption) == (True, False)
    assert (rules[False].augmentation.flip_aug, rules[False].captions.shuffle_caption) == (False, True)


def test_keys_are_unique_in_the_run_and_do_not_name_the_place(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "x.png")
    datasets = resolve([spec(folder(tmp_path / "a"), folder(tmp_path / "b")), spec(folder(tmp_path / "a"))])
    keys = [record.key for data in datasets for record in data.records]
    assert len(set(keys)) == 3
    assert not any(str(tmp_path) in key for key in keys)


# ---- metadata files


def metadata(tmp_path: Path, entries: dict[str, Any], **fields: Any) -> SubsetSpec:
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    return SubsetSpec(metadata_file=str(tmp_path / "meta.json"), **fields)


def finetune(subset: SubsetSpec, **rules: Any) -> ResolvedDataset:
    return resolve([spec(subset, kind=DatasetKind.FINETUNE, **rules)])[0]


def test_metadata_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    full = picture(tmp_path / "elsewhere" / "full.png", (80, 40))
    for name in ("a.png", "b.c.JPG", "sub/d.webp", "x.png"):
        picture(images / name)
    (tmp_path / "cwd" / "a").mkdir(parents=True)  # a folder of the key's name is not the image
    monkeypatch.chdir(tmp_path / "cwd")
    entries = {
        "a": {"caption": "cap", "tags": "t1, t2"},
        "b.c": {"tags": "t1"},
        "sub/d": {"caption": "line\nbreak", "tags": ""},
        "x.png": {},
        str(full): {"caption": "full"},
    }
    data = finetune(metadata(tmp_path, entries, image_dir=str(images), num_repeats=2))
    assert [Path(record.path).name for record in data.records] == ["a.png", "b.c.JPG", "d.webp", "x.png", "full.png"]
    assert [record.caption for record in data.records] == ["cap, t1, t2", "t1", "line\nbreak", "", "full"]
    assert [record.has_caption for record in data.records] == [True, True, True, False, True]
    assert {record.caption_path for record in data.records} == {str(tmp_path / "meta.json")}
    assert data.records[4].size == (80, 40)
    assert {record.repeats for record in data.records} == {2}


def test_missing_images_of_metadata_are_all_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    subset = metadata(tmp_path, {"a": {}, "b": {}, "c": {}}, image_dir=str(tmp_path))
    with pytest.raises(UserError) as caught:
        finetune(subset)
    lines = str(caught.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["b", "c"]
    (data,) = resolve([spec(subset, kind=DatasetKind.FINETUNE)], on_bad_image="skip")
    assert len(data.records) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "one entry for each image"),
        ("[", "line 1"),
        ('{"a": 1}', "image 'a': must be an object"),
        ('{"a": {"tags": ["x"]}}', "tags must be a text"),
        ('{"a": {"train_resolution": [512]}}', "train_resolution must be"),
    ],
)
def test_damaged_metadata(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta\.json") as caught:
        finetune(SubsetSpec(metadata_file=str(tmp_path / "meta.json"), image_dir=str(tmp_path)))
    assert message in str(caught.value)


def test_training_sizes_of_metadata_do_not_stretch_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (100, 50))
    subset = metadata(tmp_path, {"a": {"caption": "x", "train_resolution": [68, 64]}}, image_dir=str(tmp_path))
    (data,) = resolve([DatasetSpec(DatasetKind.FINETUNE, 1, None, (subset,))])
    assert (data.fits[0].bucket, data.fits[0].resized) == ((64, 64), (128, 64))
    with pytest.raises(UserError, match="switch bucket_no_upscale off"):
        finetune(subset, enable_bucket=True, bucket_no_upscale=True)
    partly = metadata(tmp_path, {"a": {"caption": "x"}}, image_dir=str(tmp_path))
    with pytest.raises(UserError, match="set resolution"):
        resolve([DatasetSpec(DatasetKind.FINETUNE, 1, None, (partly,))])


def test_prepared_latents_are_used_for_all_images_or_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.npz").write_bytes(b"")
    both = {name: {"caption": "x", "train_resolution": [64, 64]} for name in ("a", "b")}
    assert all(record.npz_path for record in finetune(metadata(tmp_path, both, image_dir=str(tmp_path))).records)
    cropped = metadata(tmp_path, both, image_dir=str(tmp_path), augmentation=Augmentation(random_crop=True))
    assert not any(record.npz_path for record in finetune(cropped).records)
    (tmp_path / "b.npz").unlink()
    partly = metadata(tmp_path, both, image_dir=str(tmp_path))
    assert not any(record.npz_path for record in finetune(partly).records)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="no image beside these latents"):
        finetune(partly)


# ---- memory of an earlier start


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were opened; every folder is worth remembering."""
    opened: list[str] = []

    def spy(path: str) -> tuple[int, int]:
        opened.append(Path(path).name)
        return measure(path)

    monkeypatch.setattr(index, "measure", spy)
    monkeypatch.setattr(index, "_WORTH_REMEMBERING", 1)
    return opened


def test_second_start_opens_only_what_changed(tmp_path: Path, counted: list[str]) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    first = found(folder(tmp_path))
    assert sorted(counted) == ["a.png", "b.png", "c.png"]
    counted.clear()
    assert found(folder(tmp_path)) == first
    assert counted == []
    picture(tmp_path / "b.png", (32, 32))
    os.utime(tmp_path / "b.png", ns=(1, 1))
    (tmp_path / "c.txt").write_text("d")
    os.utime(tmp_path / "c.txt", ns=(1, 1))
    (tmp_path / "a.png").unlink()
    again = found(folder(tmp_path))
    assert counted == ["b.png"]
    assert [(record.size, record.caption) for record in again.records] == [((32, 32), "b"), ((64, 48), "d")]
    remembered = json.loads((tmp_path / index.INDEX_NAME).read_text())
    assert set(remembered["images"]) == {"b.png", "c.png"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 1}', '{"version": 1, "images": {"a.png": [1, 2]}, "captions": {"a.txt": null}}']
)
def test_damaged_memory_is_not_trusted(text: str, tmp_path: Path, counted: list[str]) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / index.INDEX_NAME).write_text(text)
    assert found(folder(tmp_path)).records[0].caption == "x"
    assert counted == ["a.png"]


def test_memory_of_a_folder_that_cannot_be_written(
    tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_TRAINER_CACHE", str(tmp_path / "cache"))
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "images" / index.INDEX_NAME).mkdir()  # nothing can be written under that name
    for _ in range(2):
        found(folder(tmp_path / "images"))
    assert counted == ["a.png"]
    assert list((tmp_path / "cache").rglob("*.json"))


def test_small_folders_get_no_extra_file(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    found(folder(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["a.png"]


# ---- reports


def test_report_names_what_is_enlarged_cropped_and_cut(tmp_path: Path) -> None:
    picture(tmp_path / "small.png", (32, 32))
    picture(tmp_path / "wide.png", (256, 64))
    picture(tmp_path / "fine.png", (64, 64))
    (tmp_path / "fine.txt").write_text("a b c d")
    subset = folder(tmp_path, num_repeats=2, captions=CaptionRules(caption_prefix="p"))
    (report,) = describe([found(subset)], lambda captions: [len(text.split()) for text in captions], max_tokens=4)
    assert [(Path(name).name, factor) for name, factor in report.upscaled] == [("small.png", 2.0)]
    assert [(Path(name).name, share) for name, share in report.cropped] == [("wide.png", 0.75)]
    assert [(Path(name).name, count) for name, count in report.truncated] == [("fine.png", 5)]
    assert [(bucket.size, bucket.images, bucket.visits) for bucket in report.buckets] == [((64, 64), 3, 6)]
    assert (report.batches, report.subsets[0].without_caption_file) == (6, 2)
    text = "\n".join(report.lines())
    for word in ("3 images x 2 repeats", "2 take 'cat' as caption", "small.png x2.00", "wide.png 75%", "(5)"):
        assert word in text


def test_facts_for_metadata(tmp_path: Path) -> None:
    for place in ("one/5_cat", "two/5_cat", "reg/1_x"):
        picture(tmp_path / place / "a.png")
    (tmp_path / "one/5_cat/a.txt").write_text("Red, blue,, red")
    datasets = resolve(
        [
            spec(folder(tmp_path / "one/5_cat", num_repeats=5), enable_bucket=True, min_bucket_reso=64),
            spec(folder(tmp_path / "two/5_cat"), folder(tmp_path / "reg/1_x", is_reg=True)),
        ]
    )
    facts = metadata_facts(datasets)
    assert (facts.num_train_images, facts.num_reg_images) == (6, 1)
    assert facts.tag_frequency == {"5_cat": {"red": 2, "blue": 1}, "1_x": {"cat": 1}}
    assert facts.dataset_dirs == {
        "5_cat": {"n_repeats": 5, "img_count": 1},
        "5_cat (2)": {"n_repeats": 1, "img_count": 1},
    }
    assert facts.reg_dataset_dirs == {"1_x": {"n_repeats": 1, "img_count": 1}}
    assert facts.bucket_info == {
        "buckets": {"0": {"resolution": [64, 64], "count": 5}},
        "mean_img_ar_error": pytest.approx(64 / 48 - 1),
    }
    assert facts.datasets[1]["bucket_info"] is None
    assert str(tmp_path) not in json.dumps(facts.datasets)
