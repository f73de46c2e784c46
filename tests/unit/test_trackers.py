"""Trackers: which are chosen, what they are told, and real scalars in a TensorBoard file."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest

from library.log import UserError
from library.options import LogOptions, OptimizerOptions
from library.options.settings import ScriptOptions, Settings
from library.training.trackers import Trackers, chosen_trackers, config_of, init_arguments, log_folder


def settings(**values) -> Settings:
    return Settings(ScriptOptions("test", (LogOptions, OptimizerOptions)), values, {})


def test_tensorboard_is_chosen_when_only_a_folder_is_given() -> None:
    pytest.importorskip("tensorboard")
    assert chosen_trackers(LogOptions(logging_dir="logs")) == ("tensorboard",)
    assert chosen_trackers(LogOptions()) == ()


def test_missing_packages_and_folder_are_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        chosen_trackers(LogOptions(log_with="all"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "pip install tensorboard" in lines[0]
    assert "pip install wandb" in lines[1]
    assert "--logging_dir" in lines[2]


def test_wandb_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    trackers = Trackers(settings(log_with="wandb", wandb_run_name="run 7"), "network_train")
    assert trackers.log_with == ("wandb",)
    assert trackers.log_dir is None
    assert init_arguments(LogOptions(wandb_run_name="run 7"), "logs/x") == {"wandb": {"name": "run 7", "dir": "logs/x"}}


def test_folder_name_is_prefix_and_time() -> None:
    folder = log_folder(LogOptions(logging_dir="logs", log_prefix="cat_"))
    assert folder is not None
    assert re.fullmatch(r"cat_\d{14}", Path(folder).name)


def test_tracker_config_replaces_the_arguments(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[wandb]\nentity = "team"\n[wandb.settings]\nx = 1\n', encoding="utf-8")
    options = LogOptions(log_tracker_config=str(file), wandb_run_name="ignored")
    assert init_arguments(options, "logs") == {"wandb": {"entity": "team", "settings": {"x": 1}}}
    file.write_text("entity = 'team'\n")
    with pytest.raises(UserError, match=r"entity must stand in a table"):
        init_arguments(options, "logs")
    file.write_text("[wandb\n")
    with pytest.raises(UserError, match="no valid TOML"):
        init_arguments(options, "logs")
    with pytest.raises(UserError, match="there is no file"):
        init_arguments(LogOptions(log_tracker_config=str(tmp_path / "none.toml")), "logs")


def test_arguments_that_a_tracker_does_not_know_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    file = tmp_path / "t.toml"
    file.write_text("[tensorboard]\nnosuch = 1\n")
    chosen = settings(logging_dir=str(tmp_path), log_tracker_config=str(file))
    trackers = Trackers(chosen, "test")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with=list(trackers.log_with), project_dir=trackers.log_dir)
    with pytest.raises(UserError, match=r"log_tracker_config .*t\.toml: tensorboard cannot be opened .*nosuch"):
        trackers.start(chosen, accelerator)


def test_config_holds_plain_values_without_secrets_and_folders() -> None:
    chosen = settings(wandb_api_key="key_secret", logging_dir="/srv/someone/logs", optimizer_args=["betas=.9,.99"])
    config = config_of(chosen.scrubbed_dict())
    assert "secret" not in str(config)
    assert "someone" not in str(config)
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert config["optimizer_args"] == "['betas=.9,.99']"


@pytest.mark.parametrize(("given", "name"), [({}, "network_train"), ({"log_tracker_name": "cats"}, "cats")])
def test_scalars_reach_tensorboard(tmp_path: Path, given: dict[str, str], name: str) -> None:
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = settings(logging_dir=str(tmp_path), learning_rate=1e-3, **given)
    trackers = Trackers(chosen, "network_train")
    try:
        accelerator = Accelerator(cpu=True, log_with=list(trackers.log_with), project_dir=trackers.log_dir)
        trackers.start(chosen, accelerator)
        assert [tracker.name for tracker in trackers.open(accelerator)] == ["tensorboard"]
        trackers.log({"loss/current": 0.5, "lr/unet": 1e-4}, 3)
        trackers.log({"loss/current": 0.25}, 4)
        trackers.finish()
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()
    assert trackers.log_dir is not None
    events = EventAccumulator(str(Path(trackers.log_dir) / name)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/current")] == [(3, 0.5), (4, 0.25)]


def test_without_trackers_everything_is_silent() -> None:
    trackers = Trackers(settings(), "network_train")
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert trackers.log_with == ()


def test_a_failing_tracker_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        is_main_process = True
        trackers = ()
        calls = 0

        def init_trackers(self, *_: object, **__: object) -> None:
            pass

        def log(self, *_: object, **__: object) -> None:
            self.calls += 1
            raise ConnectionError("service is away")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    chosen = settings(logging_dir="logs")
    trackers, broken = Trackers(chosen, "x"), Broken()
    trackers.start(chosen, broken)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        trackers.log({"loss": 1.0}, 1)
        trackers.log({"loss": 1.0}, 2)
    assert broken.calls == 1
    assert "service is away" in caplog.text
