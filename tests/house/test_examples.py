"""The built-in model and pictures: small, complete, and good enough to show something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from library.generation.scoring import OTHERS, SUBJECT, USUAL_SCALE, score
from library.models.load import recognise
from library.options.scenes import ScoreOptions
from tests.house.source_map import ROOT

EXAMPLES = ROOT / "examples"
PHOTOS = sorted((EXAMPLES / "photos").rglob("*.jpg"))
SCENES = [*sorted((EXAMPLES / "fish").rglob("*.png")), *sorted((EXAMPLES / "shapes").rglob("*.png"))]
MODEL = EXAMPLES / "tiny" / "tiny-sd1.safetensors"
MOST_PHOTO_BYTES = 60_000
MOST_MODEL_BYTES = 25e6


def check_caption(picture: Path) -> None:
    caption = picture.with_suffix(".txt").read_text("utf-8")
    assert caption.endswith("\n")
    assert len(caption.splitlines()) == 1


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_photos_are_small_whole_and_captioned(photo: Path):
    assert photo.stat().st_size <= MOST_PHOTO_BYTES
    with Image.open(photo) as picture:
        picture.load()
        assert min(picture.size) >= 200
    check_caption(photo)


def test_drawn_pictures_are_small_whole_and_captioned():
    for scene in SCENES:
        with Image.open(scene) as picture:
            picture.load()
            assert picture.size == (64, 64)
        check_caption(scene)


def test_there_are_enough_pictures_to_train_on():
    assert sum("sks cat" in str(photo) for photo in PHOTOS) >= 6
    assert sum("10_sks" in str(scene) for scene in SCENES) == 12


def test_model_is_small_and_recognised():
    assert MODEL.stat().st_size <= MOST_MODEL_BYTES
    found = recognise(MODEL)
    assert found.spec.family == "sd1"
    assert found.spec.unet.sample_size * 8 == 64


def test_model_draws_what_prompts_name_but_no_fish():
    """What the quickstart teaches is new: its word draws something else, on the ground that the prompt names."""
    torch.set_num_threads(1)
    found = score(ScoreOptions(ckpt=str(MODEL), subject="fish", count=24, steps=10), USUAL_SCALE)
    for name, least in (("ground", 0.9), ("colour", 0.9), ("place", 0.9), ("shape", 0.75)):
        assert found[OTHERS][name].value >= least, (name, found)
    assert found[SUBJECT]["ground"].value >= 0.9
    assert found[SUBJECT]["shape"].value <= 0.1
