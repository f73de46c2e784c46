"""What sdxl_train_control_net_lllite.py writes, what its previews show, and what it refuses."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.families.sdxl import SdxlFamily
from library.generation.app import run as draw
from library.options import ModelOptions
from library.options.scripts import GEN_IMG
from networks.lllite import LLLiteSize, load_lllite
from tests.lllite_fixtures import SMALL, TWO_STEPS, Pairs, refusal, run, same
from tests.training.runs import (
    LLLITE_SCRIPT,
    SDXL_SCRIPT,
    metadata,
    tensors,
    train,
)

# ---- files


def test_the_file_loads_and_draws(model_sdxl: Path, pairs: Pairs, tmp_path: Path) -> None:
    file = run(model_sdxl, pairs, tmp_path, *SMALL, "--max_train_steps", "6", "--learning_rate", "3e-2")
    facts = metadata(file)
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert (facts["ss_cond_emb_dim"], facts["ss_network_dim"], facts["modelspec.title"]) == ("8", "6", "toy")
    parts = SdxlFamily().load(ModelOptions(pretrained_model_name_or_path=str(model_sdxl)))
    assert load_lllite(file, parts.unet).size == LLLiteSize(8, 6)

    def pixels(name: str, *options: str) -> np.ndarray:
        words = ["--ckpt", str(model_sdxl), "--steps", "2", "--W", "64", "--H", "64", "--prompt", "x", "--seed", "1"]
        assert draw(GEN_IMG, [*words, "--outdir", str(tmp_path / name), *options]) == 0
        with Image.open(next((tmp_path / name).glob("*.png"))) as picture:
            return np.asarray(picture).astype(int)

    guides = sorted(pairs.edges.iterdir())
    drawn = [
        pixels(guide.stem, "--control_net_lllite_models", str(file), "--guide_image_path", str(guide))
        for guide in guides[:2]
    ]
    assert abs(drawn[0] - pixels("plain")).max() > 3
    assert abs(drawn[0] - drawn[1]).max() > 0


@pytest.mark.parametrize("suffix", ["ckpt", "pt"])
def test_pickled_files_hold_the_same_and_are_read_again(
    suffix: str, model_sdxl: Path, pairs: Pairs, begun: Path, tmp_path: Path
) -> None:
    shared = ("--network_weights", str(begun), *TWO_STEPS, "--save_precision", "fp16")
    whole = tensors(run(model_sdxl, pairs, tmp_path, *shared))
    run(model_sdxl, pairs, tmp_path, *shared, "--save_model_as", suffix)
    pickled = torch.load(tmp_path / f"toy.{suffix}", weights_only=True)
    assert pickled.keys() == whole.keys()
    assert all(torch.equal(pickled[key], whole[key]) for key in whole)
    assert next(iter(whole.values())).dtype == torch.float16
    run(model_sdxl, pairs, tmp_path / "again", "--network_weights", str(tmp_path / f"toy.{suffix}"), *TWO_STEPS)


def test_widths_are_those_of_the_file_to_start_from(
    model_sdxl: Path, pairs: Pairs, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = ("--network_weights", str(begun), "--max_train_steps", "1", "--optimizer_type", "SGD")
    file = run(model_sdxl, pairs, tmp_path, *still, "--learning_rate", "1e-20")
    assert same(file, begun)
    assert metadata(file)["ss_cond_emb_dim"] == "8"
    folder = ("--conditioning_data_dir", str(pairs.edges))
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *folder, *still, "--network_dim", "7")
    assert "has cond_emb_dim 8 and network_dim 6; leave these two options out" in said


def test_usual_widths(model_sdxl: Path, pairs: Pairs, tmp_path: Path) -> None:
    file = run(model_sdxl, pairs, tmp_path, "--max_train_steps", "1")
    facts = metadata(file)
    assert (facts["ss_cond_emb_dim"], facts["ss_network_dim"]) == ("32", "64")


def test_the_plan_of_a_run(model_sdxl: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--conditioning_data_dir", str(pairs.edges), "--dry_run")
    assert train(model_sdxl, pairs.images, tmp_path, *words, script=LLLITE_SCRIPT) == 0
    said = capsys.readouterr().out
    assert f"after pictures of {pairs.edges}" in said
    assert "control" in said


# ---- previews


def previews(out: Path) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for path in sorted((out / "sample").glob("*.png")):
        with Image.open(path) as picture:
            found.append(np.asarray(picture).astype(int))
    return found


def test_previews_follow_their_pictures_and_change_nothing(
    model_sdxl: Path, pairs: Pairs, begun: Path, tmp_path: Path
) -> None:
    one, two = sorted(pairs.edges.iterdir())[:2]
    lines = [f"a thing --d 1 --s 2 --w 64 --h 64{guide}" for guide in ("", f" --cn {one}", f" --cn {two}", "")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(lines))
    shared = ("--network_weights", str(begun), *TWO_STEPS, "--learning_rate", "3e-2")
    plain = run(model_sdxl, pairs, tmp_path / "plain", *shared)
    drawing = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_at_first")
    with_previews = run(model_sdxl, pairs, tmp_path / "out", *shared, *drawing)
    assert same(plain, with_previews)
    drawn = previews(tmp_path / "out")
    assert len(drawn) == 12
    moments = [drawn[8:], drawn[:4], drawn[4:8]]  # names of the first begin with e, of the others with the step
    for without, after_one, after_two, without_again in moments:
        assert np.array_equal(drawn[0], without)  # what has no picture is the model's own, however far the net is
        assert np.array_equal(without, without_again)
        assert abs(after_one - without).max() > 5
        assert abs(after_one - after_two).max() > 1
    for earlier, later in pairwise(moments):  # the net of that moment draws, not the one of the beginning
        assert abs(earlier[1] - later[1]).max() > 5


def test_previews_in_half_precision(model_sdxl: Path, pairs: Pairs, begun: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    guide = next(pairs.edges.iterdir())
    prompts.write_text(f"a thing --d 1 --s 2 --w 64 --h 64 --cn {guide}\na thing --d 1 --s 2 --w 64 --h 64\n")
    shared = ("--network_weights", str(begun), "--max_train_steps", "1", "--mixed_precision", "bf16")
    drawing = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--cache_text_encoder_outputs")
    for name, more in {"mixed": (), "full": ("--full_bf16",)}.items():
        run(model_sdxl, pairs, tmp_path / name, *shared, *drawing, *more)
        guided, plain = previews(tmp_path / name)
        assert abs(guided - plain).max() > 5


def test_what_previews_cannot_show_is_said(
    model_sdxl: Path, photos: Path, pairs: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a --s 2 --w 64 --h 64 --cn {next(pairs.edges.iterdir())}\nb --s 2 --w 64 --h 64\n")
    drawing = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", *TWO_STEPS)
    run(model_sdxl, pairs, tmp_path / "net", *SMALL, *drawing)
    assert "1 prompts have no picture (--cn) and are drawn without the net" in caplog.text
    caplog.clear()
    assert train(model_sdxl, photos, tmp_path / "lora", *drawing, script=SDXL_SCRIPT) == 0
    assert "--cn has no effect: no ControlNet is trained here" in caplog.text
    assert len(previews(tmp_path / "lora")) == 2


def test_a_preview_s_picture_must_be_there(
    model_sdxl: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --cn nowhere.png\n")
    words = ("--conditioning_data_dir", str(pairs.edges), "--sample_prompts", str(prompts))
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *words, "--sample_every_n_steps", "1")
    assert "--cn nowhere.png: there is no such file" in said


# ---- bad input


def test_what_the_command_line_lacks(
    model_sdxl: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--conditioning_data_dir is missing" in refusal(model_sdxl, pairs, tmp_path, capsys)
    words = ("--conditioning_data_dir", str(pairs.edges), "--in_json", "m.json", "--reg_data_dir", "r")
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *words)
    assert "--in_json has no conditioning pictures" in said
    assert "--reg_data_dir has no conditioning pictures" in said


def test_missing_pairs_are_named_before_any_slow_work(
    pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges = tmp_path / "edges"
    shutil.copytree(pairs.edges, edges)
    (edges / "photo1.png").unlink()
    (edges / "photo3.png").write_bytes(b"")
    words = ("--conditioning_data_dir", str(edges))
    said = refusal(tmp_path / "no model is read.safetensors", pairs, tmp_path, capsys, *words)
    assert "photo1.png: has no conditioning picture" in said
    assert "photo3.png: its conditioning picture" in said
    assert "no model" not in said


def test_other_models_and_other_files(
    model: Path, model_sdxl: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--conditioning_data_dir", str(pairs.edges))
    assert "this script is for SDXL" in refusal(model, pairs, tmp_path, capsys, *folder)
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *folder, "--network_weights", str(model))
    assert "holds no ControlNet-LLLite weights" in said
    said = refusal(model_sdxl, pairs, tmp_path, capsys, *folder, "--learning_rate", "0")
    assert "nothing to train" in said


OWN_DATA = """
import torch
from library.data.records import Batch

class Data:
    guides = torch.zeros(1, 3, 64, 64)

    def __init__(self, **_):
        pass

    def __len__(self):
        return 1

    def load(self, index, clock):
        sizes = torch.full((1, 2), 64)
        return Batch(
            ("a",), (1,), ("x",), torch.ones(1), sizes, torch.zeros(1, 2), sizes, (False,),
            latents_BCHW=torch.zeros(1, 4, 8, 8), conditioning_images_BCHW=self.guides,
        )

class Pictureless(Data):
    guides = None
"""


def test_data_set_classes_of_the_user(
    model_sdxl: Path,
    pairs: Pairs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
) -> None:
    (tmp_path / "own_pairs.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("--dataset_class", "own_pairs.Data", *SMALL, *TWO_STEPS)
    assert train(model_sdxl, pairs.images, tmp_path, *own, script=LLLITE_SCRIPT) == 0
    assert len(losses) == 2
    said = refusal(model_sdxl, pairs, tmp_path, capsys, "--dataset_class", "own_pairs.Pictureless")
    assert "must have conditioning_images_BCHW" in said
