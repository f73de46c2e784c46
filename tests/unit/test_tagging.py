"""Tags by WD14 models: their inputs' forms, which tags are written, files that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library import hub
from library.log import UserError
from library.options.preparation import TagOptions
from library.preparation import tagging_run
from library.preparation.tagging import Tagger, TagRules
from library.preparation.tagging_run import tag_folder
from tests.data_fixtures import write_picture
from tools.tag_images_by_wd14_tagger import main

TABLE = """tag_id,name,category,count
0,general,9,1
1,sensitive,9,1
2,blue_sky,0,1
3,red_dress,0,1
4,^_^,0,1
5,hatsune_miku,4,1
"""
SIDE = 16


@dataclass
class FakeSession:
    """Scores: the ratings 0.1 and 0.2, mean blue, mean red, 0.5, and the share of white, all in 0..1."""

    shape: Sequence[Any] = ("batch", SIDE, SIDE, 3)
    calls: list[np.ndarray] = field(default_factory=list)

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="input_1:0", shape=list(self.shape))]

    def run(self, output_names: object, input_feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        (batch,) = input_feed.values()
        assert list(input_feed) == ["input_1:0"]
        assert batch.dtype == np.float32
        self.calls.append(batch)
        pixels = batch.transpose(0, 2, 3, 1) if self.shape[1] == 3 else batch
        means = pixels.mean((1, 2)) / 255
        white = (pixels.min(-1) > 250).mean((1, 2))
        fixed = np.ones(len(batch))
        return [np.stack([0.1 * fixed, 0.2 * fixed, means[:, 0], means[:, 2], 0.5 * fixed, white], 1)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, color in {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}.items():
        Image.new("RGB", (40, 40), color).save(folder / f"{name}.png")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.onnx").write_bytes(b"not opened")
    (model / "selected_tags.csv").write_text(TABLE)
    return folder


def tags(folder: Path, session: FakeSession | None = None, **options: Any) -> dict[str, str]:
    given = TagOptions(train_data_dir=str(folder), model_dir=str(folder.parent / "model"), **options)
    fake = session or FakeSession()
    assert tag_folder(given, lambda path: fake).exit_status == 0
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}


def test_colours_reach_the_model_as_blue_green_red(photos: Path):
    assert tags(photos) == {
        "red": "red_dress, ^_^\n",
        "blue": "blue_sky, ^_^\n",
        "white": "blue_sky, red_dress, ^_^, hatsune_miku\n",
    }


@pytest.mark.parametrize(
    "shape", [("batch", SIDE, SIDE, 3), (None, None, None, 3), ("N", 3, SIDE, SIDE), (2, SIDE, SIDE, 3), (0, 16, 16, 3)]
)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_form_of_input_gives_the_same_tags(photos: Path, shape: Sequence[Any], batch_size: int):
    session = FakeSession(shape)
    expected = tags(photos)
    assert tags(photos, session, batch_size=batch_size) == expected
    fixed = shape[0] if isinstance(shape[0], int) and shape[0] else None
    assert all(len(call) == fixed or fixed is None for call in session.calls)
    assert all(call.flags.c_contiguous for call in session.calls)


def test_pictures_stand_in_the_middle_of_a_white_square():
    tagger = Tagger.of(FakeSession((1, 8, 8, 3)))
    prepared = tagger.prepare(np.zeros((5, 8, 3), np.uint8))
    assert (prepared[:, 0, 0] == 255).tolist() == [True] + [False] * 5 + [True] * 2  # the smaller half above


@pytest.mark.parametrize("shape", [(1, 10), (1, 8, 8, 4)])
def test_models_of_anything_else_are_refused(shape: Sequence[Any]):
    with pytest.raises(UserError, match="is it a tagger"):
        Tagger.of(FakeSession(shape))


def test_rules_of_what_is_written(photos: Path, caplog: pytest.LogCaptureFixture):
    assert tags(photos, remove_underscore=True)["white"] == "blue sky, red dress, ^_^, hatsune miku\n"
    assert tags(photos, undesired_tags="red dress, ^_^", remove_underscore=True)["red"] == "\n"
    assert tags(photos, general_threshold=0.6)["red"] == "red_dress\n"
    assert tags(photos, thresh=0.6, general_threshold=0)["red"] == "blue_sky, red_dress, ^_^\n"
    assert tags(photos, character_threshold=1.0, character_tags_first=True)["white"].startswith("hatsune_miku, blue")
    assert tags(photos, use_rating_tags=True)["red"] == "sensitive, red_dress, ^_^\n"
    assert tags(photos, caption_separator="|")["red"] == "red_dress|^_^\n"
    with caplog.at_level("INFO"):
        tags(photos, frequency_tags=True, batch_size=2)
    counted = [record.message for record in caplog.records][-4:]
    assert counted == ["^_^: 3", "blue_sky: 2", "red_dress: 2", "hatsune_miku: 1"]


def test_tags_are_added_to_those_of_a_file(photos: Path):
    (photos / "red.txt").write_text(" my own,^_^ ,, hat\n")
    (photos / "blue.txt").write_bytes(b"\xff\xfe\xfa")
    written = tags_of_readable(photos)
    assert written == "my own, ^_^, hat, red_dress\n"
    assert (photos / "blue.txt").read_bytes() == b"\xff\xfe\xfa"  # not lost


def tags_of_readable(folder: Path) -> str:
    given = TagOptions(train_data_dir=str(folder), model_dir=str(folder.parent / "model"), append_tags=True)
    outcome = tag_folder(given, lambda path: FakeSession())
    assert [Path(name).name for name, _ in outcome.failures] == ["blue.png"]
    return (folder / "red.txt").read_text()


def test_a_separator_of_blanks_alone():
    assert TagRules(0.1, 0.1, separator="  ").split("a  b c") == ["a", "b", "c"]


def test_existing_files_may_stay_and_bad_images_are_passed_over(photos: Path):
    (photos / "red.txt").write_text("mine")
    (photos / "bad.png").write_bytes(b"")
    session = FakeSession()
    written = tags(photos, session, skip_existing=True, batch_size=4)
    assert written["red"] == "mine"
    assert "bad" not in written
    assert [len(call) for call in session.calls] == [2]


def test_images_that_share_a_file_are_told(photos: Path, caplog: pytest.LogCaptureFixture):
    Image.new("RGB", (40, 40), (255, 255, 255)).save(photos / "red.jpg")
    tags(photos)
    assert "share a text, that of the last: red.jpg, red.png" in caplog.text


# ---- the model's files


def options_for(folder: Path, **more: Any) -> TagOptions:
    return TagOptions(train_data_dir="in", model_dir=str(folder), **more)


def test_files_are_looked_for_not_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(tagging_run, "download_files", lambda repo, names, *more: asked.append(names))
    (tmp_path / "model.onnx").write_bytes(b"")  # an interrupted download of another program
    (tmp_path / "selected_tags.csv").write_text(TABLE)
    tagging_run.model_folder(options_for(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"x")
    tagging_run.model_folder(options_for(tmp_path))
    tagging_run.model_folder(options_for(tmp_path, force_download=True))
    assert asked == [["model.onnx"], ["model.onnx", "selected_tags.csv"]]


def test_the_tensorflow_form_is_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "saved_model.pb").write_bytes(b"x")
    with pytest.raises(UserError, match=r"--force_download\s.*ONNX"):
        tagging_run.model_folder(options_for(tmp_path))


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **named: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(UserError, match=r"--repo_id owner/x: a\.onnx could not be fetched"):
        hub.download_files("owner/x", ["a.onnx"], tmp_path, "--repo_id")


@pytest.mark.parametrize(
    ("table", "message"),
    [("name,category\n", "tag_id,name,category"), ("", "tag_id"), (TABLE + "7,x,0\n", "6 scores.*7 tags")],
)
def test_tables_of_tags_that_do_not_fit(photos: Path, table: str, message: str):
    (photos.parent / "model" / "selected_tags.csv").write_text(table)
    given = TagOptions(train_data_dir=str(photos), model_dir=str(photos.parent / "model"))
    with pytest.raises(UserError, match=message):
        tag_folder(given, lambda path: FakeSession())


def test_a_missing_onnxruntime_is_one_line(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main([str(photos), "--model_dir", str(photos.parent / "model"), "--onnx"]) == 1
    assert "pip install onnxruntime" in capsys.readouterr().err


def test_a_real_model_through_onnxruntime(photos: Path):
    """Means of the colours of each picture, by a graph with a free batch."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    scale = onnx.numpy_helper.from_array(np.array([1 / 255] * 3, np.float32), "scale")
    axes = onnx.numpy_helper.from_array(np.array([1, 2]), "axes")
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["third"]),
        helper.make_node("Concat", ["third", "third"], ["output"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("input", float32, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("output", float32, ["batch", 6])],
        [scale, axes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(photos.parent / "model" / "model.onnx"))
    write_picture(photos / "more.png", (30, 20))
    words = [str(photos), "--model_dir", str(photos.parent / "model"), "--batch_size", "3", "--onnx"]
    assert main(words) == 0
    assert (photos / "white.txt").read_text() == "blue_sky, red_dress, ^_^, hatsune_miku\n"
    assert (photos / "red.txt").read_text() == "blue_sky, hatsune_miku\n"
