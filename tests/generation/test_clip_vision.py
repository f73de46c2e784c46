"""A picture's CLIP vector in place of the pooled text vector (SDXL)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from library.families.base import TextCondition
from library.generation.clip_vision import ClipVision
from library.generation.highres import make_stages
from library.log import UserError
from library.options.generation import HighresOptions
from tests.generation.engines import CPU, job, toy_engine, write_picture


def vision_folder(place: Path, width: int = 48) -> str:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=width,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vision_folder(tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_only_the_prompts_vectors_are_replaced(vision: str, tmp_path: Path, copies: int) -> None:
    paths = [write_picture(tmp_path / f"{seed}.png", (80, 60), seed) for seed in (1, 2)]
    clip = ClipVision(vision, 0.5, CPU)
    text = TextCondition(torch.randn(2 * copies, 77, 96), torch.randn(2 * copies, 48))
    assert text.pooled_BP is not None
    before = text.pooled_BP.clone()
    found = clip.in_place_of_text(text, paths, copies)
    assert found.pooled_BP is not None
    first = 2 if copies > 1 else 0
    rows = list(range(2 * copies))
    for row in rows:
        if row not in (first, first + 1):
            assert torch.equal(found.pooled_BP[row], before[row])
    assert torch.equal(found.hidden_BTD, text.hidden_BTD)
    assert torch.equal(text.pooled_BP, before)  # texts are kept for the next batch: they stay as they are
    for row, path in enumerate(paths):
        assert torch.allclose(found.pooled_BP[first + row], 0.5 * clip.vector(path))
    assert not torch.allclose(clip.vector(paths[0]), clip.vector(paths[1]), atol=1e-3)


def test_the_vector_is_that_of_transformers_own_preparation(vision: str, tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path = write_picture(tmp_path / "a.png", (96, 64))
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    network: Any = CLIPVisionModelWithProjection.from_pretrained(vision).eval()
    with torch.no_grad():
        expected = network(**processor(Image.open(path).convert("RGB"), return_tensors="pt")).image_embeds[0]
    found = ClipVision(vision, 1.0, CPU).vector(path)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999  # Lanczos here, bicubic there


def test_it_changes_the_picture_in_both_stages(vision: str, tmp_path: Path) -> None:
    files = {"source": write_picture(tmp_path / "a.png", (128, 128))}
    one = job(files=files, width=128, height=128, strength=1.0)
    plain, weak, strong = (
        toy_engine("sdxl", clip_vision_model=vision, clip_vision_strength=strength) for strength in (None, 0.5, 3.0)
    )
    pictures = [engine.draw([one]) for engine in (plain, weak, strong)]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
    assert (pictures[1] - pictures[2]).abs().max() > 1e-3
    stages = make_stages(strong, HighresOptions(highres_fix_scale=0.5, highres_fix_steps=2))
    (drawn,) = stages.draw([one])
    assert drawn.pictures_BCHW.shape == (1, 3, 128, 128)


def test_what_does_not_fit_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide = ClipVision(vision_folder(tmp_path / "wide", 40), 1.0, CPU)
    text = TextCondition(torch.zeros(2, 77, 96), torch.zeros(2, 48))
    path = write_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="40 numbers, the model's 48"):
        wide.in_place_of_text(text, [path], 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--clip_vision_model .*empty"):
        ClipVision(str(tmp_path / "empty"), 1.0, CPU).vector(path)
    toy_engine("sd1", clip_vision_strength=1.0)
    assert "it is for SDXL" in caplog.text
