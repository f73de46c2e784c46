"""The face that a file's name tells: ``<stem>_cx_cy_w_h.png``, centre and size in pixels of the picture."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from library.data.records import Size

_SUFFIX = re.compile(r"(?<=.)_(\d+)_(\d+)_(\d+)_(\d+)$")


@dataclass(frozen=True, slots=True)
class FaceBox:
    """Centre and size of a face in pixels of the original image."""

    center: tuple[int, int]
    size: Size


def face_box(path: str) -> FaceBox | None:
    """The face that a file name tells; None if it tells none, or a centre of 0."""
    match = _SUFFIX.search(os.path.splitext(os.path.basename(path))[0])
    if match is None:
        return None
    center_x, center_y, width, height = (int(group) for group in match.groups())
    return FaceBox((center_x, center_y), (width, height)) if center_x > 0 and max(width, height) > 0 else None


def without_face(stem: str) -> str:
    """The stem of a file name without the face that it tells."""
    return _SUFFIX.sub("", stem)
