"""Log handlers, one-line errors and progress."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from library.log import Progress, UserError, first_line, progress, setup_logging, some_of

log = logging.getLogger("library.some_module")


@pytest.fixture(autouse=True)
def main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as the main process."""
    monkeypatch.delenv("RANK", raising=False)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_simple_lines_go_to_stdout_once_however_often_it_is_set_up(capsys: pytest.CaptureFixture[str]):
    for _ in range(3):
        setup_logging(simple=True)
    log.info("seen once")
    log.debug("not seen")
    log.warning("doubt")
    assert capsys.readouterr().out == "seen once\nWARNING: doubt\n"


def test_plain_lines_on_stderr_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    setup_logging()
    log.info("here")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "here\n")


@pytest.mark.parametrize(("level", "seen"), [("DEBUG", 3), (None, 2), ("WARNING", 1), ("ERROR", 0)])
def test_levels(level: str | None, seen: int, capsys: pytest.CaptureFixture[str]):
    setup_logging(level, simple=True)
    log.debug("a")
    log.info("b")
    log.warning("c")
    assert len(capsys.readouterr().out.splitlines()) == seen


def test_other_packages_show_from_warning_on(capsys: pytest.CaptureFixture[str]):
    setup_logging("DEBUG", simple=True)
    logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("somebody.else").warning("trouble")
    assert capsys.readouterr().out == "WARNING: trouble\n"


def test_the_file_takes_the_place_of_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.log"
    file.write_text("of an earlier run\n")
    setup_logging(file=str(file))
    log.info("one ü")
    setup_logging(file=str(file))  # a second set-up of the same run keeps what is there
    log.info("two")
    assert file.read_text(encoding="utf-8") == "one ü\ntwo\n"
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_only_the_main_process_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    setup_logging(file=str(tmp_path / "run.log"))
    log.warning("from another process")
    assert not (tmp_path / "run.log").exists()


def test_other_processes_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    setup_logging(simple=True)
    log.info("the same as the main process says")
    log.warning("trouble")
    assert capsys.readouterr().out == "[process 1] WARNING: trouble\n"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"--console_log_file .*cannot be written \(Is a directory\)"):
        setup_logging(file=str(tmp_path))


def test_several_problems_in_one_error():
    assert str(UserError.of(["a", "b"])) == "a\nb"


def test_long_texts_and_lists_are_cut_for_one_line():
    assert first_line(OSError("\n no such host \nmore")) == "no such host"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 300))) == 200
    assert some_of("abcde") == "a, b, c, d, e"
    assert some_of("abcdefg") == "a, b, c, d, e and 2 more"


def test_progress_shows_count_fields_speed_and_time_left():
    clock = Clock()
    bar: Progress[int] = Progress(10, "steps", clock=clock)
    assert bar.facts() == "0/10"
    clock.now += 2
    bar.advance(images=4, loss=0.123456, note="x")
    assert bar.facts() == "1/10 | loss 0.1235 | note x | 2 images/s | 0:18 left"
    clock.now += 7000
    bar.advance()
    assert bar.facts().endswith("| 7:46:48 left")


def test_progress_speed_forgets_the_slow_start():
    clock = Clock()
    bar: Progress[int] = Progress(1000, "steps", clock=clock)
    clock.now += 3600
    bar.advance(images=1)
    for _ in range(100):
        clock.now += 0.5
        bar.advance(images=1)
    assert "| 2 images/s | 7:29 left" in bar.facts()


def test_a_resumed_run_counts_only_its_own_speed():
    clock = Clock()
    bar: Progress[int] = Progress(100, "steps", clock=clock)
    bar.start_at(90)
    clock.now += 1
    bar.advance()
    assert bar.facts() == "91/100 | 0:09 left"


def test_plain_progress_prints_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]):
    setup_logging(simple=True)
    clock = Clock()
    with Progress(25, "caching", seconds=10, clock=clock) as bar:
        for _ in range(25):
            clock.now += 1
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["caching: 10/25 | 0:15 left", "caching: 20/25 | 0:05 left", "caching: 25/25"]


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]):
    setup_logging(simple=True)
    for seconds in (0.5, 1.0):
        clock = Clock()
        with Progress(2, f"{seconds} a piece", seconds=10, quiet_seconds=2, clock=clock) as bar:
            for _ in range(2):
                clock.now += seconds
                bar.advance()
    assert capsys.readouterr().out == "1.0 a piece: 2/2\n"


def test_progress_over_an_iterable(capsys: pytest.CaptureFixture[str]):
    setup_logging(simple=True)
    assert list(progress([3, 1, 2], "reading")) == [3, 1, 2]
    assert list(progress(iter("ab"), "of unknown length")) == ["a", "b"]
    assert capsys.readouterr().out == "reading: 3/3\nof unknown length: 2\n"


def test_progress_is_silent_in_other_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    setup_logging("DEBUG", simple=True)
    assert list(progress([1], "reading")) == [1]
    assert capsys.readouterr().out == ""


def test_on_a_terminal_rich_draws_the_bar_and_the_records(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    setup_logging()
    with progress(2, "steps") as bar:
        log.info("between")
        bar.advance(2, loss=0.5)
    captured = capsys.readouterr()
    assert "between" in captured.err
    assert "2/2 | loss 0.5" in captured.err
    assert captured.out == ""


def test_a_bar_inside_a_bar_shows_once_it_lasts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    setup_logging()
    clock = Clock()
    with progress(2, "steps"), Progress(3, "validation", quiet_seconds=2, clock=clock) as inner:
        inner.advance()
        assert "validation" not in capsys.readouterr().err
        clock.now += 2
        inner.advance()
    assert "validation" in capsys.readouterr().err


def test_retries_of_the_hub_are_not_shown():
    setup_logging()
    retries = logging.getLogger("huggingface_hub.utils._http")
    assert not retries.isEnabledFor(logging.WARNING)
    assert retries.isEnabledFor(logging.ERROR)
