"""Scalars and previews of a run: what is written when, under which names, and that none of it touches the training."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from library.training import preview
from tests.cells_fixtures import Runner
from tests.training.runs import train


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def fit(tmp_path, model, model_sd2, photos, monkeypatch) -> Runner:
    return Runner(tmp_path, {"sd1": model, "sd2": model_sd2}, photos, monkeypatch)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a sks thing --w 64 --h 64 --d 7 --s 2\n# not drawn\na table --n blur --w 72 --h 64 --s 2 --l 1\n")
    return path


# ---- scalars


def events_of(folder: Path):
    """The one event file of a run below the log folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = folder.glob("exp_*")
    return EventAccumulator(str(place / "network_train"), size_guidance={"images": 0}).Reload()


def test_tensorboard_reads_a_run(fit, prompts, tmp_path):
    pytest.importorskip("tensorboard")
    logs = ("--logging_dir", str(tmp_path / "logs"), "--log_prefix", "exp_")
    rates = ("--unet_lr", "1e-3", "--text_encoder_lr", "5e-4", "--scale_weight_norms", "1")
    warm = ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "2")
    draw = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "4")
    done = fit(*logs, *rates, *warm, *draw, steps=5)
    events = events_of(tmp_path / "logs")

    def scalars(name: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars(name)]

    assert [(index + 1, loss) for index, loss in enumerate(done.losses)] == scalars("loss/current")
    means = [sum(done.losses[max(0, n - 4) : n]) / min(n, 4) for n in range(1, 6)]  # of the last epoch's worth of steps
    assert list(enumerate(means, 1)) == scalars("loss/average")
    assert [(4, means[3]), (5, means[4])] == scalars("loss/epoch")
    steps = range(1, 6)
    # a rate stands at the step that is done: logged is what the next step takes
    assert [value for _, value in scalars("lr/unet")] == [5e-4, 1e-3, 1e-3, 1e-3, 1e-3]
    assert [value for _, value in scalars("lr/textencoder")] == [2.5e-4, 5e-4, 5e-4, 5e-4, 5e-4]
    for name in ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm", "grad_norm"):
        assert [step for step, _ in scalars(name)] == list(steps)
    pictures = {tag: [(image.step, image.width) for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert pictures == {"sample_0": [(4, 64), (5, 64)], "sample_1": [(4, 72), (5, 72)]}


def test_rate_of_an_adaptive_optimizer_is_logged(fit, tmp_path):
    pytest.importorskip("tensorboard")
    logs = ("--logging_dir", str(tmp_path / "logs"), "--log_prefix", "exp_")
    fit(*logs, "--optimizer_type", "Prodigy", "--learning_rate", "1", steps=2)
    tags = events_of(tmp_path / "logs").Tags()["scalars"]
    assert {"lr/unet", "lr/textencoder", "lr/d*lr"} <= set(tags)


def test_missing_wandb_is_one_line(model, photos, tmp_path, monkeypatch, capsys):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else original(name, *more)
    )
    assert train(model, photos, tmp_path, "--log_with", "wandb") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert said == ["error: --log_with wandb: the package wandb is not installed; run: pip install wandb"]


# ---- previews


def moments(file: Path) -> Counter[str]:
    """How many previews were drawn at each moment, by the part of their names that tells it."""
    names = [path.stem.split("_") for path in (file.parent / "sample").glob("*.png")]
    assert all(name[0] == "toy" for name in names)
    numbers = Counter(name[2] for name in names)
    assert numbers["00"] == numbers["01"]
    assert all(("7" in name[4:]) == (name[2] == "00") for name in names)  # the seed stands last, if there is one
    return Counter(name[1] for name in names)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sample_every_n_steps", "2"), ["000002", "000004", "000005"]),
        (("--sample_at_first", "--sample_every_n_steps", "4"), ["e000000", "000004", "000005"]),
        (("--sample_every_n_epochs", "1", "--sample_every_n_steps", "1"), ["e000001", "e000002", "e000003"]),
    ],
    ids=["steps", "at_first", "epochs"],
)
def test_previews_appear_at_their_moments(fit, prompts, options, expected):
    done = fit("--sample_prompts", str(prompts), *options, "--train_batch_size", "2", steps=5)
    assert moments(done.file) == dict.fromkeys(expected, 2)


@pytest.mark.parametrize(
    "options",
    [
        "--network_dropout 0.2 --network_args module_dropout=0.2 --shuffle_caption",
        "--optimizer_type AdamWScheduleFree",
        "--mixed_precision bf16 --fp8_base --gradient_checkpointing",
    ],
    ids=["random", "schedule_free", "fp8"],
)
def test_previews_change_no_byte(fit, prompts, options, monkeypatch):
    """Drawn, failing, or absent: the trained file is the same."""
    asked = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_at_first")
    plain, drawn = fit(*options.split()), fit(*options.split(), *asked)

    def fail(*_):
        raise RuntimeError("the sampler broke")

    assert sum(moments(drawn.file).values()) == 8
    monkeypatch.setattr(preview, "draw_sample", fail)
    failed = fit(*options.split(), *asked)
    assert not (failed.file.parent / "sample").exists()
    assert drawn.file.read_bytes() == plain.file.read_bytes()
    assert failed.file.read_bytes() == plain.file.read_bytes()


def test_a_failing_preview_is_told_and_the_others_are_drawn(fit, prompts, monkeypatch, caplog):
    original = preview.draw_sample

    def fail_once(engine, prompt, sampler):
        if prompt.prompt == "a table":
            raise RuntimeError("the sampler broke")
        return original(engine, prompt, sampler)

    monkeypatch.setattr(preview, "draw_sample", fail_once)
    done = fit("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", steps=2)
    assert len(list((done.file.parent / "sample").glob("*_00_*.png"))) == 1
    told = [
        record.getMessage() for record in caplog.records if record.levelname == "WARNING" and "preview" in record.name
    ]
    assert told == ["preview 1 (000002) failed: RuntimeError: the sampler broke"]
