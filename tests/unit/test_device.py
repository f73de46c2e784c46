"""Devices and number formats: what is chosen, and one line for each thing that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library import device
from library.log import UserError
from library.options import PrecisionOptions

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"full_fp16": True}, CUDA, ["--full_fp16 needs --mixed_precision fp16"]),
        ({"full_fp16": True, "mixed_precision": "fp16"}, CPU, ["fp16 does not work on a CPU"]),
        ({"full_bf16": True}, CPU, ["--full_bf16 needs --mixed_precision bf16"]),
        ({"fp8_base": True}, CPU, ["--fp8_base needs"]),
        ({"fp8_base": True, "mixed_precision": "bf16"}, CPU, []),
        ({"fp8_base": True, "mixed_precision": "fp16"}, torch.device("mps"), ["Apple"]),
        ({"xformers": True}, CPU, ["--xformers: "]),
        ({"xformers": True, "mem_eff_attn": True}, CPU, []),
        ({"full_fp16": True, "full_bf16": True, "xformers": True}, CPU, ["full_fp16", "full_bf16", "xformers"]),
        ({}, CPU, []),
    ],
)
def test_problems(options: dict[str, Any], where: torch.device, words: list[str]) -> None:
    problems = device.precision_problems(PrecisionOptions(**options), where)
    assert len(problems) == len(words)
    assert all(word in line for word, line in zip(words, problems, strict=True))
    assert all("\n" not in line for line in problems)
    if words:
        with pytest.raises(UserError, match=words[0]):
            device.check_precision(PrecisionOptions(**options), where)
    else:
        device.check_precision(PrecisionOptions(**options), where)


def test_dtypes() -> None:
    assert [device.weight_dtype(word) for word in ("no", "fp16", "bf16")] == [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]
    assert device.save_dtype(None) is None
    assert device.save_dtype("fp16") == torch.float16
    assert device.vae_dtype(PrecisionOptions(mixed_precision="bf16")) == torch.bfloat16
    assert device.vae_dtype(PrecisionOptions(mixed_precision="bf16", no_half_vae=True)) == torch.float32


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "sdpa"),
        ({"sdpa": True}, "sdpa"),
        ({"xformers": True}, "xformers"),
        ({"xformers": True, "mem_eff_attn": True}, "sliced"),
    ],
)
def test_attention(options: dict[str, bool], kind: str) -> None:
    assert device.attention_kind(PrecisionOptions(**options)) == kind


def test_choice_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.choose_device() == torch.device("xpu", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose_device() == torch.device("cuda", 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert device.choose_device() == CPU


def test_reports() -> None:
    device.empty_cache(CPU)
    assert device.describe(CPU).startswith("cpu: ")


def test_one_process_alone_just_runs_the_block() -> None:
    ran: list[int] = []
    with device.one_process_at_a_time(True):
        ran.append(1)
    assert ran == [1]
