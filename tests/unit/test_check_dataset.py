"""Checking a data set: every kind of finding, the page, and moving bad images aside so that it can be undone."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from library.data.cache_files import write_archive
from library.options.script import parse
from library.options.scripts import CHECK_DATASET
from library.preparation import check
from library.preparation.check import KINDS, CheckReport
from library.preparation.check_run import check_dataset
from library.preparation.duplicates import NearPairs, near_pairs
from tests.data_fixtures import write_picture
from tests.house.source_map import ROOT
from tools.check_dataset import main

PHOTOS = ROOT / "examples" / "photos" / "subjects" / "1_photo"
LIMITS = ("--min_side", "100", "--max_megabytes", "0.08")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos with their captions, and one spoiled file of each kind."""
    place = tmp_path / "in"
    shutil.copytree(PHOTOS, place)
    shutil.copy(place / "rocket.jpg", place / "rocket again.jpg")
    with Image.open(place / "astronaut.jpg") as photo:
        photo.resize((200, 200)).save(place / "astronaut small.jpg")
    with Image.open(place / "bricks.jpg") as photo:
        photo.convert("RGB").effect_spread(40).save(place / "huge <i>.png", compress_level=0)
    write_picture(place / "tiny.png", (60, 40))
    (place / "tiny.txt").write_text("tiny, thing")
    write_archive(place / "tiny_64x64_0a1b2c3d.npz", {}, {})
    Image.new("RGBA", (200, 200), (0, 99, 0, 9)).save(place / "glass.png")
    write_picture(place / "long.png", (1200, 150), 3)
    (place / "long.txt").write_text("many words " * 60)
    (place / "empty.png").write_bytes(b"")
    (place / "empty.npz").write_bytes(b"")
    (place / "gravel.jpg").unlink()
    whole = write_picture(place / "gravel.png", (300, 300), 7).read_bytes()
    (place / "gravel.png").write_bytes(whole[:200] + b"\0" * 99 + whole[299:])  # its header and its end are good
    (place / "galaxies.txt").write_text("\n")
    (place / "grass.txt").write_bytes(b"\xff\xfe")
    return place


def run(*words: str) -> CheckReport:
    return check_dataset(parse(CHECK_DATASET, [*words, *LIMITS, "--max_data_loader_n_workers", "2"]))


def found(report: CheckReport) -> dict[str, list[str]]:
    return {kind: sorted(Path(one.path).name for one in report.of_kind(kind)) for kind in KINDS if report.of_kind(kind)}


def test_every_kind_of_finding(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        report = run(str(folder), "--html", str(tmp_path / "page.html"))
    assert found(report) == {
        "unreadable": ["empty.png", "gravel.png"],
        "caption": ["grass.txt"],
        "tiny": ["tiny.png"],
        "duplicate": ["rocket again.jpg", "rocket.jpg"],
        "near_duplicate": ["astronaut small.jpg", "astronaut.jpg"],
        "captionless": ["astronaut small.jpg", "glass.png", "huge <i>.png", "rocket again.jpg"],
        "empty": ["galaxies.jpg"],
        "truncated": ["long.png"],
        "cropped": ["long.png"],
        "enlarged": found(report)["enlarged"],
        "transparent": ["glass.png"],
        "huge": ["huge <i>.png"],
    }
    kept = {Path(one.path).name for one in report.findings if one.stays}
    assert kept == {"rocket.jpg", "astronaut.jpg"}  # with a caption, and larger
    assert report.images == 13  # not that of the unreadable caption, which training leaves out
    assert ("tiny", 1) in report.tags
    assert "120 tokens, 45 over the limit" in caplog.text
    bucketed = sum(bucket.images for bucket in report.buckets[0])
    assert bucketed == report.images - 1  # the empty one; the torn one shows only when it is decoded


class Page(HTMLParser):
    """Collects what a page shows, and that each tag is closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "img":
            self.sources.append(str(values["src"]))
        self.links += [str(values["href"])] if "href" in values else []
        self.ids |= {str(values["id"])} if "id" in values else set()
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def test_the_distance_of_near_duplicates_is_the_one_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []

    def watched(hashes: list[int], distance: int) -> NearPairs:
        asked.append(distance)
        return near_pairs(hashes, distance)

    monkeypatch.setattr(check, "near_pairs", watched)
    page = ("--html", str(tmp_path / "page.html"))
    run(str(folder), *page)
    run(str(folder), *page, "--duplicate_distance", "2")
    assert asked == [4, 2]


def test_the_page_is_whole_and_needs_nothing_else(folder: Path, tmp_path: Path):
    run(str(folder), "--html", str(tmp_path / "page.html"), "--thumbnails", "3")
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert "Unreadable images (2)" in page.titles
    assert {"Buckets", "Tags", "Tiny images (1)"} <= set(page.titles)
    assert page.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert {link[1:] for link in page.links} <= page.ids
    assert "huge <i>.png" in "".join(page.texts)  # escaped, not a tag
    assert "://" not in text
    assert "more, without pictures" in text
    assert len(text) < 200_000


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_quarantine_takes_captions_and_caches_along_and_can_be_undone(folder: Path, tmp_path: Path):
    aside, before = tmp_path / "aside", everything(folder)
    (folder / "tiny.jpg").write_bytes(b"")  # shares tiny.txt and is moved too
    write_picture(folder / "gravel.jpg", (300, 300), 5)  # shares gravel.txt and stays
    run(str(folder), "--html", "", "--quarantine", str(aside))
    assert sorted(path.name for path in (aside / "in").iterdir()) == [
        "empty.npz", "empty.png", "gravel.png", "rocket again.jpg", "tiny.jpg", "tiny.png", "tiny.txt",
        "tiny_64x64_0a1b2c3d.npz",
    ]  # fmt: skip
    assert (folder / "gravel.txt").is_file()
    record = json.loads((aside / "quarantine.json").read_text())
    assert {Path(move["source"]).name: move["reason"].split(" ")[0] for move in record}["tiny.txt"] in (
        "tiny",
        "unreadable",
    )
    for move in record:
        shutil.move(move["target"], move["source"])
    (folder / "tiny.jpg").unlink()
    (folder / "gravel.jpg").unlink()
    assert everything(folder) == before


def test_a_caption_of_any_ending_is_no_image(folder: Path, tmp_path: Path):
    """It would be moved aside without its image, together with the image's other captions and caches."""
    (folder / "tiny.tags").write_bytes(b"\xff\xfe")
    words = ("--quarantine", str(tmp_path / "aside"), "--quarantine_kinds", "unreadable")
    report = run(str(folder), "--html", "", "--caption_extension", ".tags", *words)
    assert found(report)["caption"] == ["tiny.tags"]
    assert found(report)["unreadable"] == ["empty.png", "gravel.png"]
    assert all((folder / name).exists() for name in ("tiny.png", "tiny.tags", "tiny.txt"))


def test_a_second_quarantine_adds_to_the_record_and_overwrites_nothing(folder: Path, tmp_path: Path):
    aside = tmp_path / "aside"
    words = (str(folder), "--html", "", "--quarantine", str(aside), "--quarantine_kinds", "unreadable")
    run(*words)
    (folder / "empty.png").write_bytes(b"")
    run(*words)
    assert sorted(path.name for path in (aside / "in").glob("*.png")) == ["empty.png", "empty~1.png", "gravel.png"]
    assert len(json.loads((aside / "quarantine.json").read_text())) == 5
    (aside / "quarantine.json").write_text("{")
    (folder / "empty.png").write_bytes(b"")
    assert main([*words, *LIMITS]) == 1
    assert (folder / "empty.png").exists()


def test_what_is_missing_or_cannot_be_moved_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A metadata file may name images that are not there."""
    aside, meta = tmp_path / "aside", tmp_path / "meta.json"
    meta.write_text('{"rocket": {"tags": "a"}, "gone": {}, "sub/gone": {}, "tiny": {"caption": "c"}, "empty": {}}')
    real_move = shutil.move

    def move(source: str, target: str) -> None:
        if source.endswith("tiny.png"):
            raise PermissionError(13, "no permission")
        real_move(source, target)

    monkeypatch.setattr("library.preparation.quarantine.shutil.move", move)
    words = ("--in_json", str(meta), "--train_data_dir", str(folder), "--html", "", "--quarantine", str(aside))
    report = run(*words)
    assert {"gone", "sub/gone"} <= {one.path for one in report.of_kind("unreadable")}
    assert (aside / "in" / "empty.png").exists()
    assert (folder / "tiny.png").exists()
    assert "tiny.png: stays where it is" in caplog.text


def test_a_dry_run_moves_nothing(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    before = everything(folder)
    with caplog.at_level("INFO"):
        run(str(folder), "--html", "", "--quarantine", str(tmp_path / "aside"), "--dry_run")
    assert everything(folder) == before
    assert not (tmp_path / "aside").exists()
    assert "tiny.png -> " in caplog.text
    assert main([str(folder), "--dry_run", "--html", ""]) == 1


def test_a_data_set_is_read_as_training_reads_it(folder: Path, tmp_path: Path):
    """Folders with numbers, a data set file, a metadata file, and the configuration of a training."""
    folder.rename(tmp_path / "5_in")
    folder = tmp_path / "5_in"
    (tmp_path / "data.toml").write_text(
        f'[[datasets]]\nresolution = 256\n[[datasets.subsets]]\nimage_dir = "{folder}"\nnum_repeats = 2\n'
    )
    (tmp_path / "train.toml").write_text(f'train_data_dir = "{tmp_path}"\nnetwork_dim = 4\nresolution = "256,256"\n')
    (tmp_path / "meta.json").write_text('{"rocket": {"tags": "a, b"}, "tiny": {"caption": "c"}, "gone": {}}')
    quiet = ("--html", "")
    by_folder = run(str(tmp_path), *quiet)
    assert [subset.repeats for subset in by_folder.datasets[0].subsets] == [5]
    by_file = run("--dataset_config", str(tmp_path / "data.toml"), *quiet)
    assert by_file.datasets[0].resolution == (256, 256)
    by_training = run("--config_file", str(tmp_path / "train.toml"), *quiet)
    assert by_training.datasets[0].resolution == (256, 256)
    assert by_training.of_kind("tiny") == by_file.of_kind("tiny") == by_folder.of_kind("tiny")
    by_metadata = run("--in_json", str(tmp_path / "meta.json"), "--train_data_dir", str(folder), *quiet)
    assert found(by_metadata)["unreadable"] == ["gone"]
    assert [tag for tag, _ in by_metadata.tags] == ["a", "b", "c"]


@pytest.mark.parametrize("words", [(), ("no/such/folder",), ("--dataset_config", "x.ini")])
def test_what_is_no_data_set_is_an_error_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert main([*words, "--html", ""]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("words", "tiny"), [((), True), (("--resolution", "64"), False)])
def test_tiny_is_below_what_is_trained(tmp_path: Path, words: tuple[str, ...], tiny: bool) -> None:
    write_picture(tmp_path / "in" / "a.png", (200, 200))
    given = [str(tmp_path / "in"), "--html", "", "--max_data_loader_n_workers", "0", *words]
    report = check_dataset(parse(CHECK_DATASET, given))
    assert bool(report.of_kind("tiny")) == tiny
