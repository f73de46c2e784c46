"""What the scripts for SDXL ask of their options, refuse, and take in place of the usual defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from library.data.records import BucketRules, DatasetKind, DatasetSpec, ResolvedDataset
from library.families.sd import SdFamily
from library.families.sdxl import SdxlFamily
from library.log import UserError
from library.options.script import parse
from library.options.scripts import CACHE_LATENTS, SDXL_TRAIN_NETWORK, TRAIN_NETWORK
from library.training.prepare import check_bucket_steps

LOOSE = replace(SDXL_TRAIN_NETWORK, required=())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--v2", "--v2 is for SD 2.x models, this is for SDXL: leave it out"),
        ("--weighted_captions", "--weighted_captions is not for SDXL"),
        ("--bucket_reso_steps 48", "--bucket_reso_steps 48: must be a multiple of 32"),
    ],
)
def test_what_is_refused(argv: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(LOOSE, argv.split())
    parse(replace(TRAIN_NETWORK, required=()), argv.split())


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse(LOOSE, ["--v2", "--weighted_captions", "--bucket_reso_steps", "48"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [("--v_parameterization", "few SDXL models predict v"), ("--clip_skip 2", "has no effect on SDXL")],
)
def test_what_is_doubted(argv: str, words: str) -> None:
    (line,) = parse(LOOSE, argv.split()).warnings
    assert words in line


def test_defaults_of_the_family_yield_to_the_user() -> None:
    settings = parse(LOOSE, [])
    assert (settings.value_of("bucket_reso_steps"), settings.value_of("sample_sampler")) == (32, "euler_a")
    settings = parse(LOOSE, ["--bucket_reso_steps", "64", "--sample_sampler", "ddim"])
    assert (settings.value_of("bucket_reso_steps"), settings.value_of("sample_sampler")) == (64, "ddim")
    assert set(SDXL_TRAIN_NETWORK.specs()) >= set(TRAIN_NETWORK.specs())


def dataset(step: int, enabled: bool = True) -> ResolvedDataset:
    rules = BucketRules((1024, 1024), enable_bucket=enabled, bucket_reso_steps=step)
    return ResolvedDataset(DatasetSpec(DatasetKind.DREAMBOOTH, 1, rules, ()), (), ())


def test_bucket_steps_of_a_data_set_file() -> None:
    check_bucket_steps(SdxlFamily(), [dataset(32), dataset(64), dataset(8, enabled=False)])
    check_bucket_steps(SdFamily(), [dataset(8)])
    with pytest.raises(UserError, match="bucket_reso_steps 16, 48: must be a multiple of 32"):
        check_bucket_steps(SdxlFamily(), [dataset(48), dataset(64), dataset(16)])


def test_the_entry_script_is_for_sdxl() -> None:
    text = (Path(__file__).resolve().parents[2] / "sdxl_train_network.py").read_text("utf-8")
    assert "SDXL_TRAIN_NETWORK" in text
    assert SDXL_TRAIN_NETWORK.family == "sdxl"


def test_the_cache_tool_follows_the_training() -> None:
    tool = replace(CACHE_LATENTS, required=())
    settings = parse(tool, ["--sdxl"])
    assert settings.value_of("bucket_reso_steps") == 32
    assert "--sdxl sets --bucket_reso_steps 32" in settings.warnings
    assert parse(tool, ["--sdxl", "--bucket_reso_steps", "64"]).value_of("bucket_reso_steps") == 64
    assert parse(tool, []).value_of("bucket_reso_steps") == 64
    with pytest.raises(UserError, match="leave it out"):
        parse(tool, ["--sdxl", "--v2"])
