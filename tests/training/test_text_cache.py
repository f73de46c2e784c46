"""Whole runs with cached text encoder outputs: the same losses, nothing encoded twice, encoders off the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from library.families.sdxl import SdxlFamily
from library.options.scripts import SDXL_TRAIN
from library.training import loop, prepare
from library.training.script import Script
from library.training.text_caching import CaptionEncoder
from tests.toy import write_toy_checkpoint
from tests.training.runs import SDXL_SCRIPT, command, launch_two, tensors, train, write_photos

SCRIPT = SDXL_SCRIPT
FULL = Script(SDXL_TRAIN, kind="library.training.kinds.full:FullTraining", tracker_name="finetuning")
BASE = ("--max_train_steps", "3", "--cache_latents")
ONLY_UNET = "--network_train_unet_only"
CACHE, TO_DISK = "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"
VARIANTS = "--cache_text_encoder_outputs_variants"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("sdxl") / "toy.safetensors", "sdxl")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "pictures", [(64, 64)] * 4)


class Watch:
    """Runs a training and notes its losses, the captions encoded ahead, and those that were trained on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses: list[float] = []
        self.encoded: list[str] = []
        self.trained: list[str] = []
        step, encode, source = loop.train_step, CaptionEncoder.__call__, prepare.CachedTextSource.__call__

        def train_step(*arguments: Any) -> Any:
            report = step(*arguments)
            self.losses.append(report.loss)
            return report

        def noted_encode(own: CaptionEncoder, captions: Sequence[str]) -> Any:
            self.encoded += captions
            return encode(own, captions)

        def noted_source(own: Any, captions: Sequence[str]) -> Any:
            self.trained += captions
            return source(own, captions)

        monkeypatch.setattr(loop, "train_step", train_step)
        monkeypatch.setattr(CaptionEncoder, "__call__", noted_encode)
        monkeypatch.setattr(prepare.CachedTextSource, "__call__", noted_source)

    def __call__(
        self, model: Path, data: Path, out: Path, *more: str, status: int = 0, script: Script = SCRIPT
    ) -> list[float]:
        for noted in (self.losses, self.encoded, self.trained):
            noted.clear()
        base = (*BASE, ONLY_UNET) if script is SCRIPT else BASE
        assert train(model, data, out, *base, *more, script=script) == status
        return list(self.losses)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def archives(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in data.rglob("*_te_outputs.npz")}


# ---- the numbers


def test_cached_is_uncached_in_memory_and_on_disk(sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch) -> None:
    more = ("--caption_prefix", "pre,", "--train_batch_size", "2", "--max_token_length", "150")
    plain = watch(sdxl, pictures, tmp_path / "plain", *more)
    runs = {}
    for name, option in (("memory", CACHE), ("disk", TO_DISK), ("again", TO_DISK)):
        runs[name] = watch(sdxl, pictures, tmp_path / name, *more, option)
        assert len(watch.encoded) == (0 if name == "again" else 4)
        assert all(text.startswith("pre, a sks") for text in watch.trained)
        assert len(watch.trained) >= 6
    print("losses:", plain, "largest difference:", max(abs(a - b) for a, b in zip(plain, runs["disk"], strict=True)))
    assert len(archives(pictures)) == 4
    assert runs["memory"] == runs["disk"] == runs["again"]
    assert runs["memory"] == pytest.approx(plain, rel=1e-5)
    learnt, expected = (tensors(tmp_path / name / "toy.safetensors") for name in ("disk", "plain"))
    for key, tensor in expected.items():
        torch.testing.assert_close(learnt[key], tensor, rtol=1e-2, atol=2e-4)


def test_dropped_captions_are_the_empty_one(sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch) -> None:
    drop = ("--caption_dropout_rate", "0.5", "--train_batch_size", "4")
    plain = watch(sdxl, pictures, tmp_path / "plain", *drop)
    assert watch(sdxl, pictures, tmp_path / "disk", *drop, TO_DISK) == pytest.approx(plain, rel=1e-5)
    assert sorted(watch.encoded)[0] == ""
    assert "" in watch.trained
    assert any(watch.trained)


def test_half_precision(sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch) -> None:
    half = ("--mixed_precision", "bf16")
    plain = watch(sdxl, pictures, tmp_path / "plain", *half)
    disk = watch(sdxl, pictures, tmp_path / "disk", *half, TO_DISK)
    assert disk == watch(sdxl, pictures, tmp_path / "memory", *half, CACHE)
    assert disk == pytest.approx(plain, rel=2e-2)
    kept = watch(sdxl, pictures, tmp_path / "full", TO_DISK)
    assert len(watch.encoded) == 4  # outputs of other weights
    assert all(np.isfinite(kept))


def test_full_training_without_its_text_encoders(
    sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = watch(sdxl, pictures, tmp_path / "plain", script=FULL)
    disk = watch(sdxl, pictures, tmp_path / "disk", TO_DISK, script=FULL)
    assert len(watch.encoded) == 4
    assert disk == pytest.approx(plain, rel=1e-5)
    saved, expected = (tensors(tmp_path / name / "toy.safetensors") for name in ("disk", "plain"))
    assert saved.keys() == expected.keys()
    capsys.readouterr()
    watch(sdxl, pictures, tmp_path / "no", CACHE, "--train_text_encoder", script=FULL, status=1)
    assert f"{CACHE} and --train_text_encoder exclude each other" in capsys.readouterr().err


# ---- what varies


def test_variants_in_a_real_run(sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch) -> None:
    vary = ("--shuffle_caption", "--caption_tag_dropout_rate", "0.3", "--train_batch_size", "4", VARIANTS, "3")
    for path in pictures.rglob("*.caption"):
        path.write_text(f"sks {path.stem}, a, b, c, d, e")
    first = watch(sdxl, pictures, tmp_path / "a", *vary, TO_DISK, "--keep_tokens", "1")
    known = set(watch.encoded)
    assert 8 < len(known) <= 12
    assert set(watch.trained) <= known
    assert len(set(watch.trained)) > 4
    before = archives(pictures)
    assert first == watch(sdxl, pictures, tmp_path / "b", *vary, TO_DISK, "--keep_tokens", "1")
    watch(sdxl, pictures, tmp_path / "c", *vary, TO_DISK, "--keep_tokens", "1", "--seed", "8")
    assert (watch.encoded, archives(pictures)) == ([], before)  # another run's seed shares the files
    assert set(watch.trained) <= known


def test_what_cannot_be_cached_is_refused_before_anything_slow(
    sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, words in (
        (("--shuffle_caption", CACHE), "shuffle_caption cannot go with cached text encoder outputs unless"),
        (("--token_warmup_step", "2", VARIANTS, "2", CACHE), "token_warmup_step makes captions depend on the step"),
        (("--no-network_train_unet_only", CACHE), f"{CACHE} needs {ONLY_UNET}"),
        (("--dataset_class", "a.B", CACHE), f"{CACHE} and --dataset_class exclude each other"),
        ((VARIANTS, "2"), f"{VARIANTS} needs {CACHE}"),
        ((VARIANTS, "0", CACHE), "must be 1 or more"),
    ):
        for extra in ((), ("--dry_run",)):
            watch(sdxl, pictures, tmp_path / "out", *more, *extra, status=1)
            captured = capsys.readouterr()
            assert words in captured.err
            assert "Traceback" not in captured.err
        assert watch.encoded == []


def test_the_plan_counts_the_files(
    sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    vary = ("--shuffle_caption", VARIANTS, "2", TO_DISK, "--dry_run")
    for path in pictures.rglob("*.caption"):
        path.write_text("a, b, c, d, e, f, g, h")
    watch(sdxl, pictures, tmp_path / "out", *vary)
    megabytes = 4 * 2 * 4 * (77 * 96 + 48) / 1e6
    assert f"text encoder outputs: {megabytes:.1f} MB" in capsys.readouterr().out
    assert (watch.encoded, archives(pictures)) == ([], {})


def test_cached_captions_resume(sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch) -> None:
    shared = ("--shuffle_caption", VARIANTS, "2", "--lr_scheduler", "constant")
    whole = watch(sdxl, pictures, tmp_path / "whole", *shared, CACHE, "--max_train_steps", "4")
    watch(sdxl, pictures, tmp_path / "part", *shared, TO_DISK, "--max_train_steps", "2", "--save_state")
    state = str(tmp_path / "part" / "toy-state")
    rest = watch(sdxl, pictures, tmp_path / "rest", *shared, CACHE, "--max_train_steps", "4", "--resume", state)
    assert rest == whole[2:]
    watch(sdxl, pictures, tmp_path / "no", "--shuffle_caption", VARIANTS, "3", CACHE, "--resume", state, status=1)


# ---- the device


def test_encoders_leave_the_device_and_come_back_for_previews_only(
    sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one device here, so the moves are noted (`tests/unit/test_preview.py` follows them)."""
    encoders: list[nn.Module] = []
    events: list[str] = []
    load, to, step, encode = SdxlFamily.load, nn.Module.to, loop.train_step, SdxlFamily.encode

    def noted_load(*arguments: Any, **named: Any) -> Any:
        parts = load(*arguments, **named)
        encoders.extend(parts.text_encoders)
        return parts

    def noted_to(module: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
        if any(module is one for one in encoders):
            events.append(f"to {arguments[0]}")
        return to(module, *arguments, **named)

    def noted(what: str, function: Any) -> Any:
        return lambda *arguments, **named: (events.append(what), function(*arguments, **named))[1]

    monkeypatch.setattr(SdxlFamily, "load", noted_load)
    monkeypatch.setattr(nn.Module, "to", noted_to)
    monkeypatch.setattr(loop, "train_step", noted("step", step))
    monkeypatch.setattr(SdxlFamily, "encode", noted("encode", encode))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 2 --d 1\n")
    watch(sdxl, pictures, tmp_path / "out", CACHE, "--sample_prompts", str(prompts), "--sample_every_n_steps", "2")
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
    away, here = ["to cpu"] * 2, ["to cpu"] * 2
    drawn = [*here, "encode", "encode", *away]  # negative prompt and prompt, after the second step and at the end
    assert events == ["encode", *away, "step", "step", *drawn, "step", *drawn]


# ---- the tool


def tool(model: Path, data: Path, *more: str) -> list[str]:
    words = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "64"]
    return [*words, *more]


def test_the_tool_fills_the_cache_of_the_training(
    sdxl: Path, pictures: Path, tmp_path: Path, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    from library.options.script import parse
    from library.options.scripts import CACHE_TEXT
    from library.training.ahead import cache_text_ahead
    from tools.cache_text_encoder_outputs import main

    caplog.set_level(logging.INFO, "library")
    words = tool(sdxl, pictures, "--sdxl", "--skip_existing", "--shuffle_caption", VARIANTS, "2")
    assert main(words) == 0
    before = archives(pictures)
    assert len(before) == 4
    report = cache_text_ahead(parse(CACHE_TEXT, words))
    assert (report.total, report.reused, report.encoded) == (4, 4, 0)
    watch(sdxl, pictures, tmp_path / "out", TO_DISK, "--shuffle_caption", VARIANTS, "2")
    assert watch.encoded == []
    assert archives(pictures) == before


def test_the_tool_takes_the_command_line_of_the_training(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    from tools.cache_text_encoder_outputs import main

    assert main(command(sdxl, pictures, tmp_path / "out", *BASE, ONLY_UNET, CACHE)) == 0
    assert len(archives(pictures)) == 4


def test_the_tool_refuses_in_one_line(
    model: Path, sdxl: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.cache_text_encoder_outputs import main

    for words, message in (
        (tool(model, pictures), "need no cache"),
        (tool(sdxl, pictures, "--v2"), "--v2 is for SD 2.x models"),
        (tool(sdxl, pictures, "--shuffle_caption"), VARIANTS),
        (tool(sdxl, pictures, "--weighted_captions"), "--weighted_captions is not for SDXL"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert archives(pictures) == {}


def test_two_processes_divide_the_work(sdxl: Path, tmp_path: Path, watch: Watch) -> None:
    pictures = write_photos(tmp_path / "pictures", [(64, 64)] * 40)
    words = tool(sdxl, pictures, "--shuffle_caption", VARIANTS, "1")
    result = launch_two("tools/cache_text_encoder_outputs.py", words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        "40 entries, 0 reused, 24 captions encoded" in result.stderr
    )  # groups of 16: two for the first, one for the other
    assert len(archives(pictures)) == 40
    watch(sdxl, pictures, tmp_path / "out", TO_DISK, "--shuffle_caption", VARIANTS, "1")
    assert watch.encoded == []
