"""Conversion of models: both ways and back bit for bit, loadable by diffusers, what files say of themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library import hub
from library.checkpoint import io
from library.checkpoint.io import read_header
from library.log import UserError
from library.models.load import recognise
from library.models.spec import PredictionType
from library.options.script import parse
from library.options.scripts import CONVERT_MODEL
from tests.toy import toy_modules, write_toy_checkpoint, write_toy_folder
from tools.convert_diffusers20_original_sd import convert as convert_settings
from tools.convert_diffusers20_original_sd import main

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("sd1", "sd2", "sdxl")


def convert(source: Path, target: Path, *more: str) -> int:
    return main([str(source), str(target), *more])


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_equal(tmp_path: Path, family: str) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors", family)
    assert convert(source, tmp_path / "folder") == 0
    assert convert(tmp_path / "folder", tmp_path / "back.safetensors") == 0
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    extras = {key for key in before.keys() ^ after.keys() if "logit_scale" not in key}
    assert not extras
    assert all(torch.equal(before[key], after[key]) for key in before.keys() & after.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_folder_with_the_same_weights(tmp_path: Path, family: str) -> None:
    from diffusers import DiffusionPipeline

    source = write_toy_checkpoint(tmp_path / "model.safetensors", family, seed=4)
    assert convert(source, tmp_path / "folder.v1.5") == 0  # a dot in a folder's name
    pipe = DiffusionPipeline.from_pretrained(str(tmp_path / "folder.v1.5"), local_files_only=True)
    for name, module in toy_modules(family, 4).items():
        theirs = getattr(pipe, name).state_dict()
        ours = module.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert len(pipe.tokenizer("a cat").input_ids) == 4


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(("--fp16",), torch.float16), (("--bf16",), torch.bfloat16), (("--save_precision_as", "fp16"), torch.float16)],
)
@pytest.mark.parametrize("target", ["out.safetensors", "folder"])
def test_precision(tmp_path: Path, options: tuple[str, ...], dtype: torch.dtype, target: str) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors")
    assert convert(source, tmp_path / target, *options) == 0
    files = [tmp_path / target] if target.endswith("safetensors") else list((tmp_path / target).rglob("*.safetensors"))
    types = {info.torch_dtype for file in files for info in read_header(file)[0].values()}
    assert types == {dtype}


def test_old_checkpoints_hold_counters_and_come_back(tmp_path: Path) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors", "sd1")
    assert convert(source, tmp_path / "old.ckpt", "--epoch", "3", "--global_step", "77") == 0
    loaded = torch.load(tmp_path / "old.ckpt", weights_only=True)
    assert (loaded["epoch"], loaded["global_step"]) == (3, 77)
    assert convert(tmp_path / "old.ckpt", tmp_path / "new.safetensors") == 0
    before, after = load_file(source), load_file(tmp_path / "new.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_metadata_from_json_and_from_older_command_lines(tmp_path: Path) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors", metadata={"kept": "yes"})
    for text in ('{"a": "b", "n": 1}', "{'a': 'b', 'n': 1}"):
        assert convert(source, tmp_path / "out.safetensors", "--metadata", text) == 0
        assert read_header(tmp_path / "out.safetensors")[1] == {"kept": "yes", "a": "b", "n": "1"}


def test_what_the_model_predicts_survives(tmp_path: Path) -> None:
    for family in ("sd2", "sdxl"):
        folder = write_toy_folder(tmp_path / family, family, prediction_type="v_prediction")
        assert convert(folder, tmp_path / f"{family}_copy") == 0
        assert recognise(tmp_path / f"{family}_copy").prediction_type == "v_prediction"
    assert convert(tmp_path / "sdxl", tmp_path / "xl.safetensors") == 0
    assert recognise(tmp_path / "xl.safetensors").prediction_type == "v_prediction"
    plain = write_toy_checkpoint(tmp_path / "plain.safetensors", "sd2")
    assert convert(plain, tmp_path / "told", "--v2", "--v_parameterization") == 0
    assert recognise(tmp_path / "told").prediction_type == "v_prediction"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_file_between_two_folders_says_what_the_model_predicts(tmp_path: Path, prediction: PredictionType) -> None:
    folder = write_toy_folder(tmp_path / "folder", "sd2", prediction_type=prediction)
    assert convert(folder, tmp_path / "file.safetensors") == 0
    assert convert(tmp_path / "file.safetensors", tmp_path / "back") == 0
    assert recognise(tmp_path / "back").prediction_type == prediction


def test_sd2_that_says_nothing_is_taken_for_768_v(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the original tool, whose folders have the scheduler of 2.1."""
    plain = write_toy_checkpoint(tmp_path / "plain.safetensors", "sd2")
    assert convert(plain, tmp_path / "folder", "--v2") == 0
    assert recognise(tmp_path / "folder").prediction_type == "v_prediction"
    assert "does not say what it predicts" in caplog.text
    caplog.clear()
    assert convert(plain, tmp_path / "file.safetensors", "--v2") == 0
    assert recognise(tmp_path / "file.safetensors").prediction_type is None  # a guess is no fact
    assert "does not say" not in caplog.text


def test_the_ending_of_a_pickle_may_be_in_capitals(tmp_path: Path) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors", "sd1")
    assert convert(source, tmp_path / "OLD.CKPT") == 0
    assert "state_dict" in torch.load(tmp_path / "OLD.CKPT", weights_only=True)


def test_what_stands_under_the_name_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors", "sd1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("a folder with something in it")
    (tmp_path / "note").write_text("a file")
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (
        ("mine", "exists and is no Diffusers model"),
        ("note", "exists and is no Diffusers model"),
        ("folder.safetensors", "is a folder"),
        ("model.pt", "a .safetensors or .ckpt file or a Diffusers folder"),
    ):
        assert convert(source, tmp_path / name) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").exists()
    assert (tmp_path / "note").read_text() == "a file"
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an empty folder is filled, a model of before replaced
        assert convert(source, tmp_path / "empty") == 0


@pytest.mark.parametrize(
    ("place", "content"),
    [
        ("text_encoder/config.json", "{}"),
        ("unet/config.json", '{"block_out_channels": [32, 64], "transformer_layers_per_block": [1]}'),
        ("unet/config.json", '{"block_out_channels": [32, 64], "transformer_layers_per_block": [1, [2, 2]]}'),
        ("vae/config.json", '{"block_out_channels": 3}'),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "{}"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "no JSON"),
    ],
)
def test_damaged_folders_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, content: str
) -> None:
    folder = write_toy_folder(tmp_path / "folder")
    (folder / place).write_text(content)
    assert convert(folder, tmp_path / "out.safetensors") == 1
    error = capsys.readouterr().err.strip()
    assert "damaged" in error
    assert len(error.splitlines()) == 1


def test_tokenizer_and_scheduler_come_from_the_reference_model(tmp_path: Path) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors")
    assert convert(source, tmp_path / "reference") == 0
    settings = tmp_path / "reference" / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "_class_name": "PNDMScheduler"}))
    assert convert(source, tmp_path / "folder", "--reference_model", str(tmp_path / "reference")) == 0
    assert "PNDMScheduler" in (tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text()


def test_options_that_the_form_has_no_place_for_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "reference").mkdir()
    all_of_them = ("--epoch", "1", "--metadata", "{}", "--reference_model", str(tmp_path / "reference"))
    for target, unused in (
        ("folder", ("epoch: a Diffusers folder", "metadata: a Diffusers folder", "variant: a single file")),
        ("out.ckpt", ("metadata: a .ckpt file", "reference_model: a .ckpt file", "variant: a single file")),
        ("o.safetensors", ("epoch: a safetensors", "reference_model: a safetensors", "variant: a single file")),
    ):
        caplog.clear()
        assert convert(source, tmp_path / target, *all_of_them, "--variant", "fp16") == 0
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(told) == len(unused)
        assert all(line.startswith(f"--{start}") for line, start in zip(told, unused, strict=True))


def test_variant_chooses_the_files(tmp_path: Path) -> None:
    folder = write_toy_folder(tmp_path / "folder", "sd1", seed=0)
    half = write_toy_folder(tmp_path / "half", "sd1", seed=1)
    for file in half.rglob("*.safetensors"):
        target = folder / file.relative_to(half)
        file.rename(target.with_name(f"{target.stem}.fp16.safetensors"))
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    weights = []
    for more in ((), ("--variant", "fp16")):
        assert convert(folder, tmp_path / "out.safetensors", *more) == 0
        weights.append(load_file(tmp_path / "out.safetensors")[key])
    expected = [
        toy_modules("sd1", seed)["unet"].state_dict()["down_blocks.0.resnets.0.conv1.weight"] for seed in (0, 1)
    ]
    assert torch.equal(weights[0], expected[0])
    assert torch.equal(weights[1], expected[1])


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    source = write_toy_checkpoint(tmp_path / "model.safetensors", "sd1")
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    real = io._SafetensorsFile.tensor

    def counted(self: io.ModelFile, key: str) -> torch.Tensor:
        nonlocal most
        tensor = real(self, key)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(io._SafetensorsFile, "tensor", counted)
    assert convert(source, tmp_path / "folder") == 0
    assert 1 <= most <= 2


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors", "sd1")
    cases = [
        ((source, tmp_path / "out"), ("--v2",), "is Stable Diffusion 1.x"),
        ((source, tmp_path / "out"), ("--fp16", "--bf16"), "in one precision only"),
        ((source, tmp_path / "out"), ("--metadata", "__import__('os')"), "must be JSON"),
        ((source, tmp_path / "out"), ("--reference_model", "nowhere"), "there is no such folder"),
        ((tmp_path / "gone.safetensors", tmp_path / "out"), (), "there is no file"),
        ((source, source), (), "choose another name"),
    ]
    for arguments, more, message in cases:
        assert convert(*arguments, *more) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_as_a_program(tmp_path: Path) -> None:
    source = write_toy_checkpoint(tmp_path / "model.safetensors", "sd1")
    tool = ROOT / "tools" / "convert_diffusers20_original_sd.py"
    done = subprocess.run(
        [sys.executable, tool, source, tmp_path / "folder"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "folder: Stable Diffusion 1.x" in done.stdout + done.stderr


@pytest.mark.parametrize(("more", "encoders"), [((), 1), (("--sdxl",), 2)])
def test_all_text_encoders_of_a_hub_model_are_fetched(
    more: tuple[str, ...], encoders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(given: str, option: str, parts: tuple[str, ...], token: None, variant: str | None) -> Path:
        assert sum(part.startswith("text_encoder") for part in parts) == encoders
        raise UserError(f"{given} would be fetched in {variant}")

    monkeypatch.setattr(hub, "download_model", download)
    line = ["owner/name", str(tmp_path / "x.safetensors"), *more]
    for words, variant in (((), None), (("--variant", "fp16"), "fp16")):
        with pytest.raises(UserError, match=f"would be fetched in {variant}"):
            convert_settings(parse(CONVERT_MODEL, [*line, *words]))
