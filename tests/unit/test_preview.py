"""When previews are drawn, by whom, under which names; and that they disturb nothing."""

import logging
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from library.diffusion.schedule import make_schedule
from library.families.base import TextCondition
from library.families.sd import SdFamily
from library.generation.engine import Engine, EngineSettings
from library.generation.prompts import PromptSpec
from library.generation.sample import sample_job
from library.log import UserError
from library.training import preview
from library.training.clock import Clock
from library.training.preview import Previewer, evaluating
from library.training.preview_files import in_words, spread
from tests.text_diffusion_fixtures import toy_parts

PARTS = toy_parts()
SETTINGS = EngineSettings(make_schedule(), torch.device("cpu"))


@dataclass(frozen=True)
class Options:
    sample_prompts: str | None = None
    sample_at_first: bool = False
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --d 7 --s 2\na dog --s 2\na bird --d 9 --s 2\n", encoding="utf-8")
    return path


def previewer(folder: Path, options: Options, **extra: Any) -> Previewer:
    settings = {"sampler": "ddim", "output_dir": folder / "out", "output_name": "my", **extra}
    return Previewer(options, Engine(SdFamily(), PARTS, SETTINGS), **settings)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out" / "sample").glob("*"))


def no_drawing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the drawing by notes of what would be drawn."""
    drawn: list[str] = []

    def note(*args: Any) -> Image.Image:
        drawn.append(args[1].prompt)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(preview, "draw_sample", note)
    return drawn


def test_names_and_pictures(tmp_path: Path, prompts: Path) -> None:
    drawer = previewer(tmp_path, Options(str(prompts), sample_at_first=True))
    drawer.at_start(Clock(10, 2))
    first, second, third = files(tmp_path)
    assert first.startswith("my_e000000_00_20")
    assert first.endswith("_7.png")
    assert second.startswith("my_e000000_01_20")
    assert second.count("_") == 3  # no seed was given
    assert third.endswith("_9.png")
    with Image.open(tmp_path / "out" / "sample" / first) as picture:
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        assert np.asarray(picture).std() > 5


def moments(folder: Path, options: Options, **extra: Any) -> list[str]:
    """A run of 2 epochs of 5 steps; returns the moments in the names of what it drew."""
    drawer = previewer(folder, options, output_name=None, **extra)
    clock = Clock(10, 2)
    drawer.at_start(clock)
    for _ in range(2):
        for _ in range(5):
            clock.advance()
            drawer.after_step(clock)
        drawer.after_epoch(clock)
        if not clock.is_finished:
            clock.next_epoch()
    drawer.at_end(clock)
    return sorted({name.split("_")[0] for name in files(folder)})


def test_cadence(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = no_drawing(monkeypatch)
    steps = Options(str(prompts), sample_every_n_steps=4)
    assert moments(tmp_path / "a", steps) == ["000004", "000008", "000010"]  # the last one shows the result
    assert len(drawn) == 9
    both = replace(steps, sample_every_n_epochs=1, sample_at_first=True)
    assert moments(tmp_path / "b", both) == ["e000000", "e000001", "e000002"]  # the step rule is off
    assert moments(tmp_path / "c", replace(steps, sample_every_n_steps=None, sample_every_n_epochs=2)) == ["e000002"]
    assert moments(tmp_path / "d", Options(str(prompts))) == ["000010"]
    drawn.clear()
    assert moments(tmp_path / "e", replace(steps, sample_every_n_steps=5)) == ["000005", "000010"]
    assert moments(tmp_path / "f", replace(both, sample_every_n_epochs=3)) == ["e000000", "e000002"]
    assert len(drawn) == 12  # the result is not drawn twice
    assert moments(tmp_path / "g", replace(both, sample_prompts="")) == []


@pytest.mark.parametrize("every", [{"sample_every_n_steps": 5}, {"sample_every_n_epochs": 1}])
def test_the_last_preview_waits_for_the_result(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, every: dict[str, int]
) -> None:
    drawn = no_drawing(monkeypatch)
    drawer = previewer(tmp_path, Options(str(prompts), **every))
    clock = Clock(10, 2, epoch=2, step=10)
    drawer.after_step(clock)
    drawer.after_epoch(clock)
    assert drawn == []
    drawer.at_end(clock)
    assert len(drawn) == 3


def test_a_resumed_run_does_not_begin_again(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = no_drawing(monkeypatch)
    previewer(tmp_path, Options(str(prompts), sample_at_first=True)).at_start(Clock(10, 2, step=3))
    assert drawn == []


def test_prompts_are_shared_out_over_processes(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = no_drawing(monkeypatch)
    barriers: list[int] = []
    for rank in (0, 1):
        drawer = previewer(
            tmp_path, Options(str(prompts), sample_at_first=True), rank=rank, processes=2,
            barrier=lambda rank=rank: barriers.append(rank),
        )  # fmt: skip
        drawer.at_start(Clock(10, 2))
    assert drawn == ["a cat", "a bird", "a dog"]
    assert barriers == [0, 1]
    assert len(files(tmp_path)) == 3


def test_modes_and_random_states_are_untouched(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    network.train()
    network[1].eval()
    modes: list[bool] = []

    def draw(*args: Any) -> Image.Image:
        modes.extend(part.training for model in (network, PARTS.unet) for part in model.modules())
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return preview_of(*args)

    preview_of = preview.draw_sample
    monkeypatch.setattr(preview, "draw_sample", draw)
    PARTS.unet.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]  # noqa: NPY002
    try:
        previewer(tmp_path, Options(str(prompts), sample_at_first=True), trained=[network]).at_start(Clock(1, 1))
        assert len(files(tmp_path)) == 3
        assert modes
        assert not any(modes)
        assert all(part.training for part in PARTS.unet.modules())
    finally:
        PARTS.unet.eval()
    assert [part.training for part in network.modules()] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    keys, place = np.random.get_state()[1:3]  # noqa: NPY002
    assert np.array_equal(keys, states[2][0])
    assert place == states[2][1]


def test_texts_of_the_moment_before_are_forgotten(tmp_path: Path, prompts: Path) -> None:
    """The text encoders learn between two moments."""
    parts = toy_parts()
    seen: list[list[str]] = [[]]

    class Family(SdFamily):
        def encode(self, text_encoders: Any, tokens: Any, settings: Any) -> Any:
            seen[-1].append("text")
            return super().encode(text_encoders, tokens, settings)

    options = Options(str(prompts), sample_every_n_steps=1)
    drawer = Previewer(
        options, Engine(Family(), parts, SETTINGS), sampler="ddim", output_dir=tmp_path / "out", output_name="my"
    )
    for step in (1, 2):
        drawer.after_step(Clock(9, 1, step=step))
        seen.append([])
    assert [len(texts) for texts in seen[:2]] == [4, 4]  # three prompts, and a negative one that they share


def test_eval_mode_holds_inside_and_is_undone_after_an_error() -> None:
    network = nn.Sequential(nn.Dropout(0.5))
    network.train()

    def draw() -> None:
        with evaluating([network]):
            assert not network[0].training
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        draw()
    assert network.training
    assert network[0].training


def test_a_failed_preview_is_a_warning_and_the_others_are_drawn(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_first(*args: Any) -> Image.Image:
        if args[1].prompt == "a cat":
            raise RuntimeError("out of memory")
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(preview, "draw_sample", fail_first)
    with caplog.at_level(logging.WARNING):
        previewer(tmp_path, Options(str(prompts), sample_at_first=True)).at_start(Clock(1, 1))
    assert "out of memory" in caplog.text
    assert len(files(tmp_path)) == 2


def test_prompts_are_read_again_and_a_spoilt_file_is_a_warning(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = no_drawing(monkeypatch)
    drawer = previewer(tmp_path, Options(str(prompts), sample_every_n_epochs=1))
    prompts.write_text("a horse", encoding="utf-8")
    drawer.after_epoch(Clock(1, 1, epoch=1))
    prompts.write_text("a horse --zz", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        drawer.after_epoch(Clock(1, 1, epoch=2))
    assert drawn == ["a horse", "a horse"]
    assert "--zz" in caplog.text


def test_mistakes_show_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt"):
        previewer(tmp_path, Options("absent.txt", sample_at_first=True))


class Tracker:
    """Notes what it is given."""

    name = "wandb"

    def __init__(self) -> None:
        self.images: dict[str, tuple[tuple[int, ...], int]] = {}

    def log_images(self, values: dict[str, np.ndarray], step: int) -> None:
        self.images.update({name: (array.shape, step) for name, array in values.items()})


def test_pictures_of_all_processes_reach_the_trackers(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_drawing(monkeypatch)
    tracker, options = Tracker(), Options(str(prompts), sample_every_n_steps=1)
    previewer(tmp_path, options, rank=1, processes=2).after_step(Clock(9, 1, step=2))
    previewer(tmp_path, options, rank=0, processes=2, trackers=[tracker]).after_step(Clock(9, 1, step=2))
    assert tracker.images == {f"sample_{index}": ((1, 8, 8, 3), 2) for index in range(3)}


def test_tensorboard_takes_the_pictures(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from accelerate import Accelerator
    from accelerate.tracking import TensorBoardTracker

    no_drawing(monkeypatch)
    Accelerator(cpu=True)
    tracker = TensorBoardTracker("run", str(tmp_path / "logs"))
    tracker.start()
    drawer = previewer(tmp_path, Options(str(prompts), sample_every_n_steps=1), trackers=[tracker])
    drawer.after_step(Clock(9, 1, step=4))
    tracker.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "run"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["sample_0", "sample_1", "sample_2"]


class Encoder:
    """Stands for a text encoder: knows where it is."""

    def __init__(self, place: str) -> None:
        self.place = torch.device(place)
        self.moves = 0

    def parameters(self) -> Any:
        yield SimpleNamespace(device=self.place)

    def to(self, place: torch.device) -> None:
        self.place = place
        self.moves += 1


@pytest.mark.parametrize("fails", [False, True])
def test_text_encoders_are_on_the_device_while_they_work(fails: bool) -> None:
    encoders = (Encoder("cpu"), Encoder("meta"))
    seen: list[list[str]] = []

    class Family(SdFamily):
        def encode(self, text_encoders: Any, tokens: Any, settings: Any) -> Any:
            seen.append([str(encoder.place) for encoder in text_encoders])
            if fails:
                raise MemoryError
            return TextCondition(torch.zeros(1, 77, 8))

    parts: Any = SimpleNamespace(text_encoders=encoders)
    engine = Engine(Family(), parts, replace(SETTINGS, device=torch.device("meta")))
    shared = sample_job(Engine(Family(), PARTS, SETTINGS), PromptSpec("a cat"), "ddim").shared
    with pytest.raises(MemoryError) if fails else nullcontext():
        engine.encode((["a cat"], shared), (["a dog", "a cat"], shared))
    assert seen == [["meta", "meta"]] * (1 if fails else 2)  # each text once
    assert [str(encoder.place) for encoder in encoders] == ["cpu", "meta"]
    assert [encoder.moves for encoder in encoders] == [2, 2]  # there and back, however many texts
    if fails:
        return
    engine.encode((["a dog"], shared))
    assert [encoder.moves for encoder in encoders] == [2, 2]  # all of it is known
    engine.encode((["a cat", "a bird"], shared))
    assert seen[2:] == [["meta", "meta"]]
    assert [encoder.moves for encoder in encoders] == [4, 4]


def solid(monkeypatch: pytest.MonkeyPatch, colour: tuple[int, int, int]) -> None:
    """Let every picture be of one colour."""
    monkeypatch.setattr(preview, "draw_sample", lambda *_: Image.new("RGB", (16, 16), colour))


def sheet_colours(folder: Path) -> list[tuple[int, int, int]]:
    """The pure colours that the sheet shows in its first row of pictures, from left to right."""
    pure = {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
    sheet = np.asarray(Image.open(folder / "out" / "my_previews.png"))
    for row in sheet:
        seen = [tuple(pixel) for pixel in row.tolist() if tuple(pixel) in pure]
        if seen:
            return list(dict.fromkeys(seen))
    return []


def test_the_sheet_shows_the_course_of_the_run(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(str(prompts), sample_at_first=True, sample_every_n_steps=1)
    solid(monkeypatch, (255, 0, 0))
    drawer = previewer(tmp_path, options)
    drawer.at_start(Clock(9, 1))
    solid(monkeypatch, (0, 255, 0))
    drawer.after_step(Clock(9, 1, step=1))
    assert sheet_colours(tmp_path) == [(255, 0, 0), (0, 255, 0)]

    solid(monkeypatch, (0, 0, 255))
    resumed = previewer(tmp_path, options)
    resumed.at_start(Clock(9, 1, step=1))
    resumed.after_step(Clock(9, 1, step=2))
    assert sheet_colours(tmp_path) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_the_sheet_leaves_an_earlier_run_out(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solid(monkeypatch, (255, 0, 0))
    previewer(tmp_path, Options(str(prompts), sample_at_first=True)).at_start(Clock(9, 1))
    for file in (tmp_path / "out" / "sample").glob("*"):
        os.utime(file, (1e9, 1e9))
    solid(monkeypatch, (0, 0, 255))
    again = previewer(tmp_path, Options(str(prompts), sample_every_n_steps=5))
    again.at_start(Clock(9, 1))
    again.after_step(Clock(9, 1, step=5))
    assert sheet_colours(tmp_path) == [(0, 0, 255)]


def test_moments_in_words_and_few_columns() -> None:
    assert [in_words(moment) for moment in ("e000000", "e000012", "000400")] == [
        "before training",
        "epoch 12",
        "step 400",
    ]
    many = [f"{step:06d}" for step in range(100, 3100, 100)]
    chosen = spread(many, 8)
    assert chosen[0] == many[0]
    assert chosen[-1] == many[-1]
    assert sorted(set(chosen)) == chosen
    assert len(chosen) == 8
    assert spread(many[:8], 8) == many[:8]


def test_columns_are_in_the_order_of_time_though_a_picture_failed(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def red_but_for_the_first(*args: Any) -> Image.Image:
        if args[1].prompt == "a cat":
            raise RuntimeError
        return Image.new("RGB", (16, 16), (255, 0, 0))

    drawer = previewer(tmp_path, Options(str(prompts), sample_at_first=True, sample_every_n_steps=1))
    monkeypatch.setattr(preview, "draw_sample", red_but_for_the_first)
    drawer.at_start(Clock(9, 1))
    solid(monkeypatch, (0, 255, 0))
    drawer.after_step(Clock(9, 1, step=1))
    sheet = np.asarray(Image.open(tmp_path / "out" / "my_previews.png"))
    red, green = (np.nonzero((sheet == colour).all(axis=-1))[1] for colour in ((255, 0, 0), (0, 255, 0)))
    assert red.max() < green.min()


def test_a_pillow_without_fonts_is_a_warning(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_font(*args: Any, **more: Any) -> None:
        raise ImportError("FreeType")

    solid(monkeypatch, (255, 0, 0))
    monkeypatch.setattr("PIL.ImageFont.load_default", no_font)
    with caplog.at_level(logging.WARNING):
        previewer(tmp_path, Options(str(prompts), sample_at_first=True)).at_start(Clock(1, 1))
    assert "FreeType" in caplog.text
    assert len(files(tmp_path)) == 3


def test_an_unwritable_sheet_is_a_warning(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    solid(monkeypatch, (255, 0, 0))
    (tmp_path / "out" / "my_previews.png").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        previewer(tmp_path, Options(str(prompts), sample_at_first=True)).at_start(Clock(9, 1))
    assert "sheet of previews" in caplog.text
