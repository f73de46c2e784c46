"""The weighted mean of checkpoint files: sums written out, old names, other families, memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoint import io
from library.checkpoint.io import ModelFile, read_header
from library.checkpoint.sd_keys import HUGGINGFACE_PREFIX
from library.models.load import recognise
from tests.toy import write_toy_checkpoint
from tools.merge_models import main

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("models")
    first = write_toy_checkpoint(folder / "first.safetensors", "sd1", 0, metadata={"modelspec.title": "First one"})
    return first, write_toy_checkpoint(folder / "second.safetensors", "sd1", 1)


def run(models: list[Path], output: Path, *more: str) -> int:
    return main(["--models", *map(str, models), "--output", str(output), *more])


def test_ratios_are_linear_and_absent_ones_are_equal(models: Files, tmp_path: Path) -> None:
    a, b = (load_file(path) for path in models)
    for more, first, second in (
        (("--ratios", "0.7", "0.4"), 0.7, 0.4),
        ((), 0.5, 0.5),
        (("--ratios", "1", "-1"), 1, -1),
    ):
        assert run([*models], tmp_path / "merged", *more) == 0
        merged = load_file(tmp_path / "merged.safetensors")
        assert merged.keys() == a.keys()
        for key, tensor in merged.items():
            torch.testing.assert_close(tensor, first * a[key] + second * b[key])


def test_unet_only_leaves_text_and_vae_alone(models: Files, tmp_path: Path) -> None:
    a, b = (load_file(path) for path in models)
    assert run([*models], tmp_path / "m.safetensors", "--unet_only", "--saving_precision", "fp16") == 0
    for key, tensor in load_file(tmp_path / "m.safetensors").items():
        expected = (a[key] + b[key]) / 2 if key.startswith("model.diffusion_model.") else a[key]
        assert torch.equal(tensor, expected.half())


def test_old_names_of_the_text_encoder_count_once_and_whole_numbers_stay(models: Files, tmp_path: Path) -> None:
    """The reference added the first model's encoder a second time and made position ids of floats."""
    a, b = (load_file(path) for path in models)
    ids = torch.arange(77)[None]
    old = {key.replace(f"{HUGGINGFACE_PREFIX}text_model.", HUGGINGFACE_PREFIX): tensor for key, tensor in b.items()}
    key = f"{HUGGINGFACE_PREFIX}text_model.embeddings.position_ids"
    save_file({**a, key: ids}, tmp_path / "a.safetensors")
    save_file(old, tmp_path / "old.safetensors")
    assert run([tmp_path / "a.safetensors", tmp_path / "old.safetensors"], tmp_path / "m") == 0
    merged = load_file(tmp_path / "m.safetensors")
    assert merged.keys() == {*a, key}
    assert torch.equal(merged[key], ids)
    for name in a:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


def test_what_only_one_model_has(models: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = (load_file(path) for path in models)
    lost = "first_stage_model.decoder.conv_in.bias"
    save_file(
        {**{key: t for key, t in b.items() if key != lost}, "model_ema.x": torch.ones(2)}, tmp_path / "b.safetensors"
    )
    assert run([models[0], tmp_path / "b.safetensors"], tmp_path / "m", "--ratios", "0.25", "0.5") == 0
    merged = load_file(tmp_path / "m.safetensors")
    assert "model_ema.x" not in merged
    torch.testing.assert_close(merged[lost], 0.75 * a[lost])  # the first stands in for what the other lacks


def test_show_skipped_names_every_tensor(models: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {f"model_ema.x{number}": torch.ones(2) for number in range(9)}
    save_file({**load_file(models[1]), **extra}, tmp_path / "b.safetensors")
    for more, is_named in (((), False), (("--show_skipped",), True)):
        caplog.clear()
        assert run([models[0], tmp_path / "b.safetensors"], tmp_path / "m", *more) == 0
        assert "9 tensors that the first model lacks are left out" in caplog.text
        assert ("model_ema.x8" in caplog.text) is is_named


def test_metadata_names_all_sources(models: Files, tmp_path: Path) -> None:
    assert run([*models], tmp_path / "both.safetensors") == 0
    _, metadata = read_header(tmp_path / "both.safetensors")
    assert metadata["modelspec.merged_from"] == "First one, second"
    assert (metadata["modelspec.title"], metadata["modelspec.architecture"]) == ("both", "stable-diffusion-v1")


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_what_the_models_do_not_say_is_not_said_of_the_result(tmp_path: Path, family: str) -> None:
    """A model that was said to predict noise could not be used with --v_parameterization any more."""
    paths = [write_toy_checkpoint(tmp_path / f"{seed}.safetensors", family, seed) for seed in (0, 1)]
    assert run(paths, tmp_path / "m.safetensors") == 0
    assert recognise(tmp_path / "m.safetensors").prediction_type is None


def test_one_tensor_of_each_file_at_a_time(models: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    kind = (
        type(ModelFile).__call__ and __import__("library.checkpoint.io", fromlist=["_SafetensorsFile"])._SafetensorsFile
    )
    real = kind.tensor

    def counted(self: ModelFile, key: str) -> torch.Tensor:
        nonlocal most
        tensor = real(self, key)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(io._SafetensorsFile, "tensor", counted)
    assert run([*models], tmp_path / "m") == 0
    assert 1 <= most <= 2


def test_refusals(models: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sdxl = write_toy_checkpoint(tmp_path / "xl.safetensors", "sdxl")
    cases = [
        (([models[0], sdxl], tmp_path / "m"), (), "only models of one family can be merged"),
        (([*models], models[0]), (), "is one of --models"),
        (([*models], tmp_path / "m"), ("--ratios", "1"), "--ratios has 1 numbers for 2 files"),
        (([models[0], tmp_path / "gone.safetensors"], tmp_path / "m"), (), "there is no file"),
        (([*models], tmp_path / "m"), ("--device", "gpu"), "--device gpu: cannot be used here"),
    ]
    for arguments, more, message in cases:
        assert run(*arguments, *more) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()
