"""train_controlnet.py: what it learns, arrangements that must not change the result."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.models.build import canonical_state
from library.models.control import fresh_control, load_control, save_control_file
from library.models.load import Target
from tests.control_fixtures import toy_control
from tests.lllite_fixtures import TWO_STEPS, Pairs, control, same, write_stripes
from tests.toy import toy_modules, toy_spec
from tests.training.runs import CONTROL_SCRIPT, command, launch_two, state, stop_after, tensors, write_pairs

FLOAT = Target(torch.float32)
SGD = ("--optimizer_type", "SGD", "--learning_rate", "1e-2", "--max_grad_norm", "0")
FAMILY = {"sd1": (), "sd2": ("--v2",), "sdxl": ("--sdxl",)}
SIZES = [(130, 70), (70, 130), (64, 64), (200, 190)]
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "96")
STARTS_AT_ZERO = ("zero_convs.", "middle_block_out.", "input_hint_block.14.")


@pytest.fixture(scope="module")
def models(model: Path, model_sd2: Path, model_sdxl: Path) -> dict[str, Path]:
    return {"sd1": model, "sd2": model_sd2, "sdxl": model_sdxl}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the toy SD1 that does something, so that all of it learns from the first step on."""
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_control_file(path, toy_control(), toy_spec().unet)
    return path


def apart(one: Path, other: Path, start: Path) -> float:
    """Largest difference of two nets, relative to how far any number has moved."""
    a, b, begin = tensors(one), tensors(other), tensors(start)
    assert a.keys() == b.keys() == begin.keys()
    moved = max(float((a[key] - begin[key]).abs().max()) for key in a)
    assert moved > 1e-4
    return max(float((a[key] - b[key]).abs().max()) for key in a) / moved


# ---- what it learns


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd1", ()),
        ("sd1", ("--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing")),
        ("sd1", ("--min_snr_gamma", "5", "--noise_offset", "0.1", "--multires_noise_iterations", "3")),
        ("sd2", ("--v_parameterization", "--zero_terminal_snr", "--min_timestep", "100")),
        ("sdxl", ("--mixed_precision", "bf16", "--fp8_base", "--cache_text_encoder_outputs", "--cache_latents")),
        ("sdxl", ("--debiased_estimation_loss", "--ip_noise_gamma", "0.1")),
    ],
    ids=["sd1", "full bf16", "noise", "sd2", "sdxl", "sdxl loss"],
)
def test_three_steps(
    family: str, options: tuple[str, ...], models: dict[str, Path], pairs: Pairs, tmp_path: Path, losses: list[float]
) -> None:
    file = control(models[family], pairs, tmp_path, *FAMILY[family], "--max_train_steps", "3", *options)
    assert len(losses) == 3
    assert all(np.isfinite(losses))
    load_control(file, toy_spec(family).unet, FLOAT)
    found = tensors(file)
    outputs = [key for key in found if key.removeprefix("control_model.").startswith(STARTS_AT_ZERO)]
    assert len(outputs) == 2 * (len(toy_spec(family).unet.widths) * 3 + 2)
    assert all(bool(found[key].any()) for key in outputs)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


@pytest.mark.parametrize("family", FAMILY)
def test_a_fresh_net_is_the_encoder_and_leaves_the_model_as_it_is(family: str) -> None:
    """The U-Net with it gives what the U-Net gives without, bit for bit, whatever the picture."""
    unet: Any = toy_modules(family)["unet"]
    net: Any = fresh_control(unet, toy_spec(family).unet, FLOAT)
    own, copied = canonical_state(unet), canonical_state(net)
    assert all(torch.equal(copied[key], own[key]) for key in copied if not key.startswith("controlnet_"))
    assert bool(copied["controlnet_cond_embedding.conv_in.weight"].any())
    text_width = toy_spec(family).unet.context_width
    generator = torch.Generator().manual_seed(1)
    noisy, hidden = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, text_width, generator=generator)
    added = {}
    if family == "sdxl":
        added = {"text_embeds": torch.randn(2, 48, generator=generator), "time_ids": torch.full((2, 6), 64.0)}
    times = torch.tensor([900, 30])
    with torch.no_grad():
        skips, middle = net(noisy, times, hidden, torch.rand(2, 3, 64, 64), added_cond_kwargs=added, return_dict=False)
        plain = unet(noisy, times, hidden, added_cond_kwargs=added).sample
        guided = unet(
            noisy,
            times,
            hidden,
            added_cond_kwargs=added,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
        ).sample
    assert torch.equal(plain, guided)


def test_the_first_loss_is_the_model_s_own(model: Path, pairs: Pairs, tmp_path: Path, losses: list[float]) -> None:
    """Pictures begin to count with the third step: the first moves the zeros at the outputs only."""
    blank = tmp_path / "blank"
    blank.mkdir()
    for path in pairs.edges.iterdir():
        Image.new("RGB", (64, 64), "white").save(blank / path.name)
    for folder in (pairs.edges, blank):
        control(
            model,
            Pairs(pairs.images, folder),
            tmp_path / folder.name,
            "--max_train_steps",
            "4",
            "--learning_rate",
            "0.01",
        )
    assert losses[0] == losses[4]
    assert losses[3] != losses[7]


def test_it_learns_to_follow_its_pictures(tmp_path: Path, losses: list[float]) -> None:
    """At nearly pure noise the target (velocity) is the image, which only the conditioning picture tells."""
    model, images, edges, wrong = write_stripes(tmp_path)
    shared = ("--train_batch_size", "2", "--cache_latents", "--v_parameterization", "--min_timestep", "980")
    learning = ("--max_train_steps", "18", "--learning_rate", "3e-3")
    file = control(model, Pairs(images, edges), tmp_path / "out", *shared, *learning)
    start = ("--controlnet_model_name_or_path", str(file), "--optimizer_type", "SGD")
    looking = ("--max_train_steps", "4", "--learning_rate", "1e-20", "--seed", "11", *start)
    found: dict[str, float] = {}
    for folder in (edges, wrong):
        losses.clear()
        control(model, Pairs(images, folder), tmp_path / f"of {folder.name}", *shared, *looking)
        found[folder.name] = mean(losses)
    assert found["edges"] < 0.85 * found["wrong"], found


# ---- arrangements


def test_accumulation_checkpointing_and_workers_change_nothing(
    model: Path, pairs: Pairs, net: Path, tmp_path: Path
) -> None:
    shared = ("--controlnet_model_name_or_path", str(net), *TWO_STEPS, *SGD)
    big = control(model, pairs, tmp_path / "big", "--train_batch_size", "4", *shared)
    for name, options in {
        "accumulation": ("--gradient_accumulation_steps", "4"),
        "memory": ("--train_batch_size", "4", "--gradient_checkpointing", "--max_data_loader_n_workers", "2"),
    }.items():
        assert apart(big, control(model, pairs, tmp_path / name, *shared, *options), net) < 1e-3, name


def test_an_interruption_changes_no_byte(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    varied = Pairs(*write_pairs(tmp_path / "varied", SIZES))
    options = (
        "--max_train_steps", "4", "--train_batch_size", "2", "--gradient_accumulation_steps", "2", *BUCKETS,
        "--flip_aug", "--caption_dropout_rate", "0.2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2",
    )  # fmt: skip
    whole, broken = control(model, varied, tmp_path / "whole", *options), tmp_path / "broken"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        control(model, varied, broken, *options)
    folder = broken / "toy-step00000002-state"
    assert state(folder)["step"] == 2
    assert control(model, varied, broken, *options, "--resume", str(folder)).read_bytes() == whole.read_bytes()


def test_two_processes_equal_one_with_twice_the_batch(model: Path, pairs: Pairs, net: Path, tmp_path: Path) -> None:
    """The reference does not exchange gradients here."""
    shared = ("--conditioning_data_dir", str(pairs.edges), "--controlnet_model_name_or_path", str(net))
    shared += (*TWO_STEPS, *SGD, "--cache_latents_to_disk")
    words = command(model, pairs.images, tmp_path / "two", "--train_batch_size", "1", *shared, script=CONTROL_SCRIPT)
    done = launch_two("train_controlnet.py", words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr
    one = control(model, pairs, tmp_path / "one", "--train_batch_size", "2", *shared)
    assert apart(one, tmp_path / "two" / "toy.safetensors", net) < 1e-3


def test_what_does_not_move_is_the_same_file_again(model: Path, pairs: Pairs, net: Path, tmp_path: Path) -> None:
    still = ("--controlnet_model_name_or_path", str(net), "--max_train_steps", "1", "--optimizer_type", "SGD")
    assert same(control(model, pairs, tmp_path, *still, "--learning_rate", "1e-30"), net)
