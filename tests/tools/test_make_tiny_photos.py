"""The tool that makes examples/photos, on drawn source images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tools.make_tiny_photos import CROPS, main


def test_crops_and_captions_are_written_or_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "source", tmp_path / "photos"
    source.mkdir()
    for name in {crop.source for crop in CROPS} - {"rocket.jpg"}:
        Image.new("RGB", (640, 460), (200, 10, 10)).save(source / name)
    monkeypatch.setattr(sys, "argv", ["make_tiny_photos.py", str(source), "--target_dir", str(target)])
    with pytest.raises(SystemExit):
        main()
    assert "has no rocket.jpg; give the wheel's skimage/data" in capsys.readouterr().err
    assert not target.exists()
    Image.new("RGB", (640, 460)).save(source / "rocket.jpg")
    main()
    pictures = sorted(target.rglob("*.jpg"))
    assert len(pictures) == len(CROPS)
    assert all(max(Image.open(path).size) <= 320 for path in pictures)
    assert all(path.with_suffix(".txt").read_text("utf-8").strip() for path in pictures)
