"""Gradual Latent in an engine: sizes of the model calls, the full size at the end, nothing left for the next batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.generation.engine import Engine
from library.generation.gradual_latent import attach_gradual_latent
from library.generation.jobs import GradualLatent
from tests.generation.engines import job, pixels, toy_engine, write_mask, write_picture
from tests.generation.test_from_picture import draw
from tests.toy import write_toy_checkpoint

PLAN = GradualLatent(750, 0.5, 0.25, 2, 1.0, (3.0, 0.5, 0.5, 1.0))
LARGE = {"width": 128, "height": 192, "steps": 9, "sampler": "euler_a"}


def growing_engine(family: str = "sd1") -> Engine:
    engine = toy_engine(family)
    attach_gradual_latent(engine)
    return engine


def sizes_of_calls(engine: Engine, *jobs: Any) -> tuple[Tensor, list[tuple[int, ...]]]:
    seen: list[tuple[int, ...]] = []
    handle = engine.parts.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    try:
        return engine.draw_latents(jobs), [tuple(size) for size in seen]
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_model_calls_grow_to_the_full_size(family: str) -> None:
    """9 steps: timesteps 999, 874, 749 ... so the third step is the first that enlarges."""
    engine = growing_engine(family)
    plain, _ = sizes_of_calls(engine, job(**LARGE))
    latents, calls = sizes_of_calls(engine, job(**LARGE, gradual_latent=PLAN))
    assert calls == [(8, 8)] * 3 + [(16, 8)] * 2 + [(24, 16)] * 4
    assert latents.shape == (1, 4, 24, 16)
    assert bool(latents.isfinite().all())
    again, calls = sizes_of_calls(engine, job(**LARGE))
    assert torch.equal(again, plain)
    assert calls == [(24, 16)] * 9


def test_pictures_of_a_batch_are_those_drawn_alone() -> None:
    engine = growing_engine()
    jobs = [job(seed, **LARGE, gradual_latent=PLAN) for seed in (1, 2)]
    both, _ = sizes_of_calls(engine, *jobs)
    alone, _ = sizes_of_calls(engine, jobs[1])
    assert torch.allclose(both[1], alone[0], atol=1e-4)
    assert not torch.allclose(both[0], alone[0], atol=0.1)


def test_other_samplers_are_told_once_and_not_changed(caplog: pytest.LogCaptureFixture) -> None:
    engine = growing_engine()
    euler = {**LARGE, "sampler": "euler"}
    plain = engine.draw_latents([job(**euler)])
    for _ in range(2):
        assert torch.equal(engine.draw_latents([job(**euler, gradual_latent=PLAN)]), plain)
    assert caplog.text.count("has no effect on the sampler euler") == 1


def test_from_a_picture_with_a_mask(tmp_path: Path) -> None:
    """Growing, image to image and inpainting at once; kept pixels are kept."""
    source = write_picture(tmp_path / "a.png", (128, 192))
    mask = write_mask(tmp_path / "m.png", (0, 0, 128, 96), (128, 192))
    engine = growing_engine()
    one = job(files={"source": source, "mask": mask}, **LARGE, gradual_latent=PLAN, strength=0.7)
    latents, calls = sizes_of_calls(engine, one)
    assert len(calls) == 6
    assert calls[:2] == [(8, 8), (16, 8)]
    assert calls[-1] == (24, 16)
    picture = engine.finish([one], latents)[0]
    assert np.array_equal(((picture + 1) * 127.5).round().permute(1, 2, 0).numpy()[96:], pixels(source)[96:])


def test_settings_of_a_line_end_with_the_line(tmp_path: Path) -> None:
    """Deep Shrink and Gradual Latent in-line: a batch of their own, and off again for the next line."""
    model = write_toy_checkpoint(tmp_path / "toy.safetensors", "sd1")
    file = tmp_path / "p.txt"
    file.write_text("a cat --d 1\na cat --d 1 --dsd1 1 --dst1 0\na cat --d 1 --glt 900\na cat --d 1\n")
    size = ("--W", "128", "--H", "128", "--sampler", "euler_a", "--sequential_file_name", "--batch_size", "4")
    plain, shrunk, grown, last = map(pixels, draw(model, tmp_path / "out", "--from_file", str(file), *size))
    assert np.array_equal(plain, last)
    assert np.abs(plain - shrunk).max() > 5
    assert np.abs(plain - grown).max() > 5


@pytest.mark.parametrize(("every", "enlarging"), [("1", [3, 4]), ("3", [3, 6])])
def test_the_option_says_how_often_latents_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str, enlarging: list[int]
) -> None:
    """Of 9 steps the fourth is the first below 700; two growths lead from half to full size."""
    from library.generation import gradual_latent

    found: list[dict[int, Any]] = []
    original = gradual_latent.sizes_of

    def sizes_of(*given: Any) -> dict[int, Any]:
        found.append(original(*given))
        return found[-1]

    monkeypatch.setattr(gradual_latent, "sizes_of", sizes_of)
    model = write_toy_checkpoint(tmp_path / "toy.safetensors", "sd1")
    words = ("--prompt", "a cat", "--W", "192", "--H", "192", "--sampler", "euler_a", "--steps", "9")
    words += ("--gradual_latent_timesteps", "700", "--gradual_latent_ratio_step", "0.25")
    assert len(draw(model, tmp_path / "out", *words, "--gradual_latent_every_n_steps", every)) == 1
    assert list(found[0]) == enlarging
