"""Data set classes of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from library.data.user_dataset import load_user_dataset
from library.log import UserError

MODULE = """
class Good:
    def __init__(self, *, seed, **others):
        self.seed, self.others = seed, others
    def __len__(self):
        return 3
    def load(self, index, clock):
        return index

class Empty(Good):
    def __len__(self):
        return 0

class Strict:
    def __init__(self):
        pass

class Bad:
    def __init__(self, **others):
        pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_images_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_images_of_a_test"


def made(name: str) -> Any:
    return load_user_dataset(name, resolution=(64, 64), batch_size=2, seed=5)


def test_class_gets_keyword_arguments(module: str) -> None:
    dataset = made(f"{module}.Good")
    assert (len(dataset), dataset.seed) == (3, 5)
    assert dataset.others == {"resolution": (64, 64), "batch_size": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Good", "must be package.module.Class"),
        ("no_such_module_of_a_test.Good", "cannot be imported"),
        ("{module}.Other", "has no Other"),
        ("{module}.Bad", "lacks __len__ and load"),
        ("{module}.Empty", "has no batches"),
        ("{module}.Strict", "cannot be made with resolution, batch_size and seed"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, module: str) -> None:
    with pytest.raises(UserError, match=message):
        made(name.format(module=module))
