"""Folders are whole or absent, also when the program ends between the two renames."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from library.checkpoint import folders
from library.checkpoint.folders import atomic_folder, recover, recover_all
from library.checkpoint.io import WriteError, save_safetensors
from library.families.stable import find_source


def write(target: Path, text: str) -> None:
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def content(target: Path) -> str:
    return (target / "sub" / "file").read_text()


def test_a_folder_is_made_and_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    write(target, "one")
    (target / "more").write_text("")
    write(target, "two")
    assert content(target) == "two"
    assert os.listdir(target) == ["sub"]
    assert os.listdir(target.parent) == ["model"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[int, bool]] = []
    target, real = tmp_path / "model", os.fsync

    def noted(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, target.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write(target, "x")
    assert (os.stat(target / "sub" / "file").st_ino, False) in flushed
    if os.name != "nt":
        assert {(os.stat(target / "sub").st_ino, False), (os.stat(tmp_path).st_ino, True)} <= set(flushed)


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "two"


class Killed(BaseException):
    """Nothing of the program runs after it: not even what it does on the way out."""


def killed_between_the_renames(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, place: Path) -> None:
        if Path(place) == target:
            raise Killed
        real(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", replace)
        patch.setattr(folders, "recover", lambda folder: None)
        patch.setattr(folders, "_remove", lambda *folders: None)
        with pytest.raises(Killed):
            write(target, "two")
    assert not target.exists()


def test_a_kill_between_the_renames_leaves_the_old_folder_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    write(target, "one")
    killed_between_the_renames(target, monkeypatch)
    assert find_source(str(target), "--vae", ("vae",)).path == target
    assert content(target) == "one"
    killed_between_the_renames(target, monkeypatch)
    write(target, "three")
    assert content(target) == "three"
    assert os.listdir(tmp_path) == ["model"]


def test_the_next_run_puts_back_what_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name, "one")
        killed_between_the_renames(tmp_path / name, monkeypatch)
    recover_all(tmp_path, re.compile("cat"))
    assert content(tmp_path / "cat") == "one"
    assert not (tmp_path / "dog").exists()
    recover(tmp_path / "dog")
    assert content(tmp_path / "dog") == "one"


def test_an_error_between_the_renames_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, real = tmp_path / "model", os.replace
    write(target, "one")

    def replace(source: Path, place: Path) -> None:
        if Path(source).name.endswith(".tmp"):
            raise PermissionError(errno.EACCES, "in use", str(source))
        real(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", replace)
        with pytest.raises(WriteError, match=f"no permission to write {target};"):
            write(target, "two")
    assert content(target) == "one"
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_names_the_file_by_the_name_that_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("library.checkpoint.io.tensor_bytes", full)
    with pytest.raises(WriteError, match="the disk is full") as caught, atomic_folder(tmp_path / "model") as folder:
        save_safetensors(folder / "unet" / "w.safetensors", {"a": torch.zeros(1)})
    assert f"could not write {tmp_path / 'model' / 'unet' / 'w.safetensors'} " in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
