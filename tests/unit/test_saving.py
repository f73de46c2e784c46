"""Names, cadence and removal of saved files."""

from pathlib import Path

from library.options import SaveOptions
from library.training.clock import Clock, due_counts, is_due
from library.training.loop import StepReport
from library.training.saving import Saved, SavePlan, Saver, clear_leftovers, free_name, outdated, stem

REPORT = StepReport(loss=0.0, keys=(), sample_count=1, grad_norm=0.0)


def options(folder: Path, **values) -> SaveOptions:
    return SaveOptions(output_dir=str(folder), output_name="cat", **values)


def saver(opts: SaveOptions, num_epochs: int = 9, suffix: str = ".safetensors") -> Saver:
    def write_model(path: Path, clock: Clock, finished_epochs: int) -> None:
        path.write_text(f"step {clock.step}, {finished_epochs} epochs")

    def write_state(folder: Path, clock: Clock) -> None:
        folder.mkdir(exist_ok=True)

    return Saver(
        opts,
        SavePlan.of(opts, num_epochs),
        suffix,
        is_main=True,
        wait=lambda: None,
        write_model=write_model,
        write_state=write_state,
        after_write=lambda path, is_state, is_last: None,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_names_are_the_references():
    assert stem("cat", "epoch", 2) == "cat-000002"
    assert stem("cat", "step", 100) == "cat-step00000100"
    assert stem(None, "epoch", 2) == "epoch-000002"
    assert stem(None, "step", 3) == "at-step00000003"
    assert stem(None, "end", 0) == "last"


def test_is_due():
    assert [count for count in range(10) if is_due(count, 3)] == [3, 6, 9] == list(due_counts(9, 3))
    assert not is_due(5, None)


def test_every_10_keep_30_removes_step_10_at_step_50():
    assert outdated([10, 20, 30, 40, 50], 50, "step", keep_n=30, every_n=10) == [10]
    assert outdated([10, 20, 30, 40], 40, "step", keep_n=30, every_n=10) == []


def test_epochs_are_rotated(tmp_path):
    work = saver(options(tmp_path, save_every_n_epochs=2, save_last_n_epochs=2))
    for epoch in range(1, 9):
        work.after_epoch(Clock(max_train_steps=90, num_epochs=9, epoch=epoch, step=epoch * 10))
    assert names(tmp_path) == ["cat-000006.safetensors", "cat-000008.safetensors"]


def test_states_may_go_earlier_than_their_models(tmp_path):
    often = {"save_every_n_epochs": 2, "save_last_n_epochs": 3, "save_state": True}
    for name, more in {"own": {"save_last_n_epochs_state": 1}, "same": {}}.items():
        (tmp_path / name).mkdir()
        work = saver(options(tmp_path / name, **often, **more))
        for epoch in range(1, 9):
            work.after_epoch(Clock(max_train_steps=90, num_epochs=9, epoch=epoch, step=epoch * 10))
    models = [f"cat-00000{epoch}.safetensors" for epoch in (4, 6, 8)]
    assert names(tmp_path / "own") == sorted([*models, "cat-000008-state"])
    assert names(tmp_path / "same") == sorted([*models, *(f"cat-00000{epoch}-state" for epoch in (4, 6, 8))])


def test_states_of_steps_have_a_limit_of_their_own(tmp_path):
    often = {"save_every_n_steps": 10, "save_last_n_steps": 20, "save_state": True}
    for name, more in {"own": {"save_last_n_steps_state": 10}, "same": {}}.items():
        work = saver(options(tmp_path / name, **often, **more))
        for step in range(5, 55, 5):
            work.after_step(Clock(max_train_steps=90, num_epochs=9, step=step), REPORT)
    models = [f"cat-step000000{step}.safetensors" for step in (30, 40, 50)]
    assert names(tmp_path / "own") == sorted([*models, "cat-step00000040-state", "cat-step00000050-state"])
    assert names(tmp_path / "same") == sorted([*models, *(f"cat-step000000{step}-state" for step in (30, 40, 50))])


def test_a_file_is_told_how_many_epochs_are_whole(tmp_path):
    work = saver(options(tmp_path, save_every_n_steps=5, save_every_n_epochs=1))
    clock = Clock(max_train_steps=90, num_epochs=9, epoch=3, step=25)
    work.after_step(clock, REPORT)
    assert (tmp_path / "cat-step00000025.safetensors").read_text() == "step 25, 2 epochs"
    work.after_epoch(clock)
    assert (tmp_path / "cat-000003.safetensors").read_text() == "step 25, 3 epochs"
    work.at_end(clock)
    assert (tmp_path / "cat.safetensors").read_text() == "step 25, 3 epochs"


def test_the_last_epoch_writes_only_the_final_file(tmp_path):
    work = saver(options(tmp_path, save_every_n_epochs=1), num_epochs=2)
    clock = Clock(max_train_steps=20, num_epochs=2, epoch=2, step=20)
    work.after_epoch(clock)
    work.at_end(clock)
    assert names(tmp_path) == ["cat.safetensors"]


def test_epoch_ratio_becomes_an_interval(tmp_path):
    plan = SavePlan.of(options(tmp_path, save_n_epoch_ratio=4), num_epochs=10)
    assert plan.epoch_saves(10) == [2, 4, 6, 8]
    assert SavePlan.of(options(tmp_path, save_n_epoch_ratio=0), num_epochs=10).epoch_saves(10) == []


def test_an_earlier_runs_file_is_kept_under_a_numbered_name(tmp_path):
    (tmp_path / "cat.safetensors").write_text("treasure")
    (tmp_path / "cat.old1.safetensors").write_text("older treasure")
    saver(options(tmp_path)).at_end(Clock(max_train_steps=1, num_epochs=1, step=1))
    assert (tmp_path / "cat.old2.safetensors").read_text() == "treasure"
    assert (tmp_path / "cat.old1.safetensors").read_text() == "older treasure"
    assert (tmp_path / "cat.safetensors").read_text() == "step 1, 1 epochs"


def test_own_file_is_replaced_in_place(tmp_path):
    work = saver(options(tmp_path, save_every_n_steps=1))
    clock = Clock(max_train_steps=5, num_epochs=1, step=3)
    work.after_step(clock, REPORT)
    work.at_stop(clock)
    assert names(tmp_path) == ["cat-step00000003-state", "cat-step00000003.safetensors"]


def test_a_state_of_an_epoch_goes_on_with_the_next(tmp_path):
    places: list[tuple[int, int, int]] = []
    work = saver(options(tmp_path, save_every_n_epochs=1, save_every_n_steps=4, save_state=True))
    work._write_state = lambda folder, clock: places.append((clock.epoch, clock.step_in_epoch, clock.step))
    clock = Clock(max_train_steps=12, num_epochs=3, epoch=2, step_in_epoch=4, step=8)
    work.after_step(clock, REPORT)
    work.after_epoch(clock)
    assert places == [(2, 4, 8), (3, 0, 8)]


def test_the_model_of_a_run_that_was_made_longer_is_kept(tmp_path):
    first = saver(options(tmp_path, save_state_on_train_end=True))
    first.at_end(Clock(max_train_steps=3, num_epochs=1, step=3))
    longer = saver(options(tmp_path, save_state_on_train_end=True))
    clock = Clock(max_train_steps=5, num_epochs=2, step=3)
    longer.go_on(Saved.from_json(first.saved.as_json()), clock)
    clock.step = 5
    longer.at_end(clock)
    assert (tmp_path / "cat.old1.safetensors").read_text() == "step 3, 1 epochs"
    assert names(tmp_path) == ["cat-state", "cat.old1.safetensors", "cat.safetensors"]


def test_names_with_dots_are_whole(tmp_path):
    work = saver(SaveOptions(output_dir=str(tmp_path), output_name="v1.5"))
    assert work.state_beside(tmp_path / "v1.5.safetensors").name == "v1.5-state"
    folders = saver(SaveOptions(output_dir=str(tmp_path), output_name="v1.5"), suffix="")
    assert folders.state_beside(tmp_path / "v1.5-step00000002").name == "v1.5-step00000002-state"
    (tmp_path / "v1.5").mkdir()
    assert free_name(tmp_path / "v1.5").name == "v1.5.old1"


def test_a_stop_always_leaves_a_state(tmp_path):
    saver(options(tmp_path)).at_stop(Clock(max_train_steps=5, num_epochs=1, step=2))
    assert "cat-step00000002-state" in names(tmp_path)


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path):
    left = [".cat.0123abcd.tmp.safetensors", "..cat-step00000002.0123abcd.tmp.89abcdef.tmp.safetensors"]
    kept = ["cat.safetensors", ".cat", ".dog.0123abcd.tmp.safetensors", "cat.0123abcd.tmp.safetensors"]
    for name in (*left, *kept):
        (tmp_path / name).write_text("")
    for name in (".cat-state.01234567.tmp", ".cat-000001-state.gone", ".cat-000002-ema.0123abcd.tmp"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path, "cat")
    assert names(tmp_path) == sorted(kept)


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path):
    for name in (".cat.former", ".cat-000001-state.former", "cat-000001-state", ".dog.former"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path, "cat")
    assert names(tmp_path) == [".dog.former", "cat", "cat-000001-state"]
