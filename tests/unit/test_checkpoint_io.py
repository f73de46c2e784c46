"""Reading and writing model files: whole or absent, byte for byte, and one clear line for every bad file."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as reference_save

from library.checkpoint import io
from library.checkpoint.hashes import data_sha256
from library.checkpoint.io import LazyTensor, WriteError, atomic_path, open_model_file, read_header, save_safetensors
from library.log import UserError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,  # not contiguous
    "a.alpha": torch.tensor(4.0),
    "c.half": torch.ones(3, dtype=torch.float16),
    "d.ids": torch.arange(5),
    "e.flag": torch.tensor([True, False, True]),
    "f.none": torch.zeros(0, 3),
    "g.kernel": torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last),
}


# ---- atomic writes


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_path(target) as path:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("durable", [True, False])
def test_atomic_path_replaces_makes_folders_and_keeps_the_suffix(tmp_path: Path, durable: bool) -> None:
    target = tmp_path / "new" / "cat.npz"
    with atomic_path(target, durable=durable) as path:
        assert path.suffix == ".npz"
        assert path.name.startswith(".")
        assert not target.exists()
        path.write_bytes(b"x")
    assert target.read_bytes() == b"x"
    assert os.listdir(target.parent) == ["cat.npz"]


@pytest.mark.parametrize("durable", [True, False])
def test_what_must_survive_a_power_cut_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    flushed: list[tuple[int, bool]] = []
    target, real = tmp_path / "model.bin", os.fsync

    def noted(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, target.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with atomic_path(target, durable=durable) as path:
        path.write_bytes(b"x")
    assert ((target.stat().st_ino, False) in flushed) == durable
    assert len(flushed) <= 2 * durable  # the folder's entry after it, where the system can


@pytest.mark.skipif(os.name == "nt", reason="file modes")
def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_safetensors(tmp_path / "a.safetensors", TENSORS)
        with atomic_path(tmp_path / "b.bin") as path:  # a writer that makes a private file of its own
            path.unlink()
            path.touch(mode=0o600)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "b.bin")] == [0o644, 0o644]


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "file.txt")
    io.atomic_write_text(link, "ä\n")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file.txt").read_bytes() == "ä\n".encode()


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EACCES, "no permission")]
)
def test_write_problems_are_one_line_and_leave_nothing(tmp_path: Path, code: int, words: str) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "x.safetensors"):
            raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=words) as caught:
        fail()
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == code
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "x.safetensors") in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_written_whole_inside_another_write_is_told_by_its_last_name(tmp_path: Path) -> None:
    def fail() -> None:  # as when a network, which writes whole files by itself, is saved by the trainer
        with atomic_path(tmp_path / "x.safetensors") as outer, atomic_path(outer):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(WriteError, match=f"could not write {tmp_path / 'x.safetensors'} ") as caught:
        fail()
    assert "tmp." not in str(caught.value)
    assert caught.value.errno == errno.ENOSPC


class FullFile(FileIO):
    """A file on a disk that has room for its first bytes only."""

    room = 1000

    def write(self, data: Any, /) -> int:
        self.room -= len(memoryview(data).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_while_a_pickle_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda path, mode: FullFile(path, mode.replace("b", "")))
    with pytest.raises(WriteError, match=f"the disk is full: could not write {tmp_path / 'x.ckpt'} "):
        io.save_pickle(tmp_path / "x.ckpt", {"a": torch.zeros(100_000)})
    assert os.listdir(tmp_path) == []


def test_pickles_of_the_same_content_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        io.save_pickle(tmp_path / name, {"a": torch.arange(9.0)})
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def test_other_errors_are_not_dressed_up(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "x"):
            Path(tmp_path / "missing").read_bytes()

    with pytest.raises(FileNotFoundError):
        fail()


def test_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        io.atomic_write_text(tmp_path / "file" / "x.txt", "")


# ---- writing safetensors


@pytest.mark.parametrize("metadata", [None, {"b": "2", "a": "ö"}])
def test_bytes_equal_the_official_writer(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(path, TENSORS, metadata)
    plain = {key: value.contiguous() for key, value in TENSORS.items()}
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    official = reference_save(plain, metadata)
    (official_length,) = struct.unpack("<Q", official[:8])
    assert data[8 + length :] == official[8 + official_length :]
    assert data_sha256(path) == hashlib.sha256(data[8 + length :]).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[key], plain[key]) for key in plain)
    assert read_header(path)[1] == (metadata or {})


def test_same_content_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a", TENSORS, {"x": "1", "y": "2"})
    save_safetensors(tmp_path / "b", dict(reversed(TENSORS.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_cast_concerns_floating_point_only(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a", TENSORS, None, torch.bfloat16)
    infos, _ = read_header(tmp_path / "a")
    assert {key: info.dtype for key, info in infos.items()} == {
        "b.weight": "BF16",
        "a.alpha": "BF16",
        "c.half": "BF16",
        "d.ids": "I64",
        "e.flag": "BOOL",
        "f.none": "BF16",
        "g.kernel": "BF16",
    }


def test_lazy_tensors_are_read_one_after_the_other(tmp_path: Path) -> None:
    alive: list[str] = []

    def reader(name: str) -> torch.Tensor:
        alive.append(name)
        return torch.full((4,), float(len(alive)))

    lazy = {name: LazyTensor(torch.float32, (4,), lambda name=name: reader(name)) for name in "abc"}
    save_safetensors(tmp_path / "a", lazy)
    assert alive == ["a", "b", "c"]
    assert load_file(tmp_path / "a")["c"].tolist() == [3.0] * 4


# ---- reading


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_content_decides_not_the_extension(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_safetensors(path, TENSORS)
    with open_model_file(path) as file:
        assert all(torch.equal(file.tensor(key), value) for key, value in TENSORS.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_pickles_of_both_kinds(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    path = tmp_path / "x.ckpt"
    state = {"state_dict": TENSORS, "epoch": 3} if wrapped else dict(TENSORS)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with open_model_file(path) as file:
        assert file.infos.keys() == TENSORS.keys()
        assert all(torch.equal(file.tensor(key), value) for key, value in TENSORS.items())
    assert read_header(path)[0]["b.weight"].shape == (4, 3)


class Runner:
    """A pickle of this object would run a command on loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": TENSORS, "x": Runner(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code"):
        open_model_file(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bare_pickle_with_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Runner(marker)))
    with pytest.raises(UserError):
        open_model_file(tmp_path / "evil.pt")
    assert not marker.exists()


def test_trainer_leftovers_become_shells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks")
    kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", module)
    instance = kind()
    instance.best = 1.5
    torch.save({"state_dict": TENSORS, "callbacks": {kind: {"a": 1}, "b": instance}}, tmp_path / "x.ckpt")
    monkeypatch.undo()
    with open_model_file(tmp_path / "x.ckpt") as file:
        assert torch.equal(file.tensor("d.ids"), TENSORS["d.ids"])


@settings(max_examples=40, deadline=None)
@given(keep=st.integers(0, 2000))
def test_a_safetensors_file_cut_anywhere_names_itself(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_safetensors(path, TENSORS, {"note": "n" * 100})
    data = path.read_bytes()
    path.write_bytes(data[: min(keep, len(data) - 1)])
    with pytest.raises(UserError, match=r"x\.safetensors") as caught:
        open_model_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
def test_a_pickle_cut_names_itself(tmp_path: Path, zipped: bool, part: float) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.randn(300, 100)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=r"x\.ckpt.*(damaged|readable)"):
        open_model_file(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "not a safetensors file|damaged|not a readable"),
        (struct.pack("<Q", 2) + b"[]", "damaged|not a readable"),
        (struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}      ' + b"0000", "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_is_no_model(tmp_path: Path, content: bytes, words: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_model_file(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        open_model_file(tmp_path / "none.safetensors")
