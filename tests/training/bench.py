"""A bench for wrong input: makes wrong things, runs the trainer on them, and reads what it says."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from library.models import load
from library.training import prepare
from tests.training.runs import train, write_photos


@dataclass
class Bench:
    """Makes wrong things in a folder of its own, runs the trainer on them, and reads what it says."""

    tmp: Path
    model: Path
    model_sd2: Path
    photos: Path
    capsys: pytest.CaptureFixture[str]
    slow_work: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def own_photos(self, count: int = 2) -> Path:
        """The folder with the numbered folder; the images are photo0.png and so on."""
        return write_photos(self.tmp / "data", [(64, 64)] * count)

    def images(self, count: int = 2) -> Path:
        """The numbered folder itself."""
        return self.own_photos(count) / "1_sks thing"

    def header(self, name: str, *keys: str) -> Path:
        """A safetensors file of empty tensors."""
        rows = {key: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for key in keys}
        text = json.dumps(rows).encode()
        return self.file(name, struct.pack("<Q", len(text)) + text)

    def run(
        self, *options: object, model: Path | None = None, data: Path | None = None, out: Path | None = None
    ) -> int:
        texts = [str(option) for option in options]
        return train(model or self.model, data or self.photos, out or self.out, "--max_train_steps", "1", *texts)

    def refusal(self, *options: object, late: bool = False, **places: Path) -> list[str]:
        """The lines of the error. ``late``: the base model may be read first, but no latents may be made."""
        status = self.run(*options, **places)
        said = self.capsys.readouterr().err
        assert status == 1, said
        assert "Traceback" not in said
        assert said.count("error: ") == 1
        assert "latents" not in self.slow_work
        assert late or not self.slow_work
        assert not list(self.tmp.glob("out/*.safetensors"))
        return said.partition("error: ")[2].strip().splitlines()


def make_bench(tmp: Path, model: Path, model_sd2: Path, photos: Path, capsys, monkeypatch) -> Bench:
    """A bench that notes when weights are read and latents are made."""
    made = Bench(tmp, model, model_sd2, photos, capsys)

    def noted(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **more: object) -> object:
            made.slow_work.append(name)
            return original(*args, **more)

        return call

    monkeypatch.setattr(load, "load_parts", noted("weights", load.load_parts))
    monkeypatch.setattr(prepare, "cache_latents", noted("latents", prepare.cache_latents))
    return made


def refused(bench: Bench, options: Sequence[object], *words: str, late: bool = False, **places: Path) -> None:
    """One line that has all the words."""
    lines = bench.refusal(*options, late=late, **places)
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
