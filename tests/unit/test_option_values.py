"""Forms in which users write sizes and lengths."""

from __future__ import annotations

import pytest

from library.options.values import steps_or_share, training_size


@pytest.mark.parametrize("raw", ["512", 512, [512], "512,512", [512, 512], "512, 512", 512.0])
def test_resolution_forms(raw: object):
    assert training_size(raw) == (512, 512)


@pytest.mark.parametrize("raw", ["", "a", "512,768,1", [1, 2, 3], 0, "-512", [512, -1], True, "512x768", 1.5])
def test_resolution_refused(raw: object):
    with pytest.raises(ValueError, match="width,height"):
        training_size(raw)


@pytest.mark.parametrize(
    ("raw", "steps"), [("100", 100), (100.0, 100), (0.1, 0.1), ("10%", 0.1), ("0.5", 0.5), (0, 0), ("0%", 0), (1, 1)]
)
def test_warmup_forms(raw: object, steps: float):
    assert steps_or_share(raw) == steps
    assert isinstance(steps_or_share(raw), float) == (0 < steps < 1)


@pytest.mark.parametrize("raw", [-1, 1.5, "100%", "-5%", "x", True, "nan", "inf"])
def test_warmup_refused(raw: object):
    with pytest.raises(ValueError, match="number of steps"):
        steps_or_share(raw)
