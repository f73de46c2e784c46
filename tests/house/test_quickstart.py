"""quickstart.py: answers in one line when something is wrong, and does nothing twice."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.house.source_map import ROOT, imports_of


@pytest.fixture
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_under_test", ROOT / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been run; none is."""
    made: list[list[str]] = []

    def record(command: list[object], failure: str, extra_env: object = None) -> None:
        made.append([str(part) for part in command])

    monkeypatch.setattr(quickstart, "run", record)
    return made


def test_only_the_standard_library_is_imported():
    names = {item.target.split(".")[0] for item in imports_of(ROOT / "quickstart.py")}
    assert names <= set(sys.stdlib_module_names)


def test_an_old_python_can_read_it_far_enough_to_refuse(quickstart: ModuleType, monkeypatch, capsys):
    ast.parse((ROOT / "quickstart.py").read_text("utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(quickstart.sys, "version_info", (3, 9, 1))
    assert quickstart.main([]) == 1
    message = capsys.readouterr().err
    assert "3.10 or newer is needed" in message
    assert message.count("\n") == 1


def test_installs_once(quickstart: ModuleType, calls: list[list[str]], monkeypatch, tmp_path: Path):
    venv = tmp_path / "venv"
    venv.mkdir()
    torch_there = iter([True, False, True])  # pip answers, torch is missing, torch answers after the installation
    monkeypatch.setattr(quickstart, "answers", lambda python, code: next(torch_there))
    python = quickstart.install(venv, "torch==9.9", with_dev=False)
    assert [command[-1] for command in calls] == ["torch==9.9", str(ROOT / "requirements.lock")]
    monkeypatch.setattr(quickstart, "answers", lambda python, code: True)
    assert quickstart.install(venv, "torch==9.9", with_dev=False) == python
    assert len(calls) == 2
    quickstart.install(venv, "torch==9.9", with_dev=True)
    assert str(ROOT / "requirements-dev.txt") in calls[-1]


def test_a_broken_off_write_leaves_the_earlier_stamp(
    quickstart: ModuleType, calls: list[list[str]], monkeypatch, tmp_path: Path
):
    stamp = tmp_path / "quickstart.stamp"
    stamp.write_text("of earlier requirements")
    monkeypatch.setattr(quickstart, "answers", lambda python, code: True)

    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        quickstart.install(tmp_path, "torch==9.9", with_dev=False)
    assert stamp.read_text() == "of earlier requirements"


def test_keeps_the_torch_that_is_there(quickstart: ModuleType, calls: list[list[str]], monkeypatch, tmp_path: Path):
    monkeypatch.setattr(quickstart, "answers", lambda python, code: True)
    quickstart.install(tmp_path, "torch==9.9", with_dev=False)
    assert not any("torch==9.9" in command for command in calls)


def test_never_empties_a_folder_that_is_no_environment(quickstart: ModuleType, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert quickstart.main(["--venv", str(tmp_path)]) == 1
    assert "give another folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_every_check_runs_even_if_one_fails(quickstart: ModuleType, monkeypatch):
    ran: list[str] = []

    def fail_first(command: list[object], failure: str, extra_env: object = None) -> None:
        ran.append(failure)
        if len(ran) == 1:
            raise quickstart.SetupError(f"{failure} (exit status 1)")

    monkeypatch.setattr(quickstart, "run", fail_first)
    with pytest.raises(quickstart.SetupError, match="failed: style"):
        quickstart.test(Path("python"))
    assert len(ran) == 4


def test_reports_pictures_before_and_after(quickstart: ModuleType, tmp_path: Path, capsys):
    for name in ("x_e000000_00_20260101000000_1.png", "x_000400_00_20260101000100_1.png", "x_previews.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "x.safetensors").write_bytes(b"")
    quickstart.report(tmp_path, 0.0, ["accelerate", "launch"])
    lines = capsys.readouterr().out.splitlines()
    assert "x.safetensors" in lines[lines.index("LoRA:") + 1]
    assert "x_previews.png" in lines[lines.index("Pictures before and after, side by side:") + 1]


def test_pictures_of_one_time_only_are_a_failure(quickstart: ModuleType, tmp_path: Path):
    for name in ("x_000400_00_20260101000100_1.png", "x_previews.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(quickstart.SetupError, match="no pictures"):
        quickstart.report(tmp_path, 0.0, [])


def test_no_pictures_is_a_failure(quickstart: ModuleType, tmp_path: Path):
    with pytest.raises(quickstart.SetupError, match="no pictures"):
        quickstart.report(tmp_path, 0.0, [])


def test_threads_are_half_of_many_processors_and_all_of_few(quickstart: ModuleType):
    assert [quickstart.threads(count) for count in (1, 2, 3, 4, 8, 24)] == [1, 2, 2, 2, 4, 12]
