"""Cutting and turning pictures by a face: plain geometry, and the pixels that follow from it. Nothing is detected here.

Points and sizes are (x, y) and (width, height) in pixels; pictures are RGB arrays HWC. A picture with several faces is
never changed in place: the cut of each begins with the same original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from library.data.images import Pixels
from library.data.records import Size


@dataclass(frozen=True, slots=True)
class Face:
    """A face: the middle and size of its box, and the angle of the line through its eyes in degrees, clockwise."""

    center: tuple[float, float]
    size: tuple[float, float]
    angle: float = 0.0

    @property
    def side(self) -> float:
        """The longer side of the box."""
        return max(self.size)

    def scaled(self, factor: float) -> Face:
        """The face in a picture enlarged by ``factor``."""
        center, size = self.center, self.size
        return replace(self, center=(center[0] * factor, center[1] * factor), size=(size[0] * factor, size[1] * factor))

    def moved(self, left: float, top: float) -> Face:
        """The face in a picture that begins at (left, top) of this one."""
        return replace(self, center=(self.center[0] - left, self.center[1] - top))


@dataclass(frozen=True, slots=True)
class CutRules:
    """How pictures are cut: the options of the tool. ``crop_ratio``: the cut as multiples of the face's size."""

    rotate: bool = False
    crop_size: Size | None = None
    crop_ratio: tuple[float, float] | None = None
    resize_face_size: int | None = None
    resize_fit: bool = False


@dataclass(frozen=True, slots=True)
class FaceCut:
    """What is done to the picture after turning: scaled to ``scaled``, then the box of ``size`` at ``left_top`` taken.

    ``face`` is where the face then is.
    """

    scaled: Size
    left_top: tuple[int, int]
    size: Size
    face: Face
    enlarged_over_face_size: bool = False


def eye_angle(right_eye: tuple[float, float], left_eye: tuple[float, float]) -> float:
    """Degrees by which the line from the right eye (left in the picture) to the left one falls."""
    return math.degrees(math.atan2(left_eye[1] - right_eye[1], left_eye[0] - right_eye[0]))


def plan_cut(size: Size, face: Face, rules: CutRules) -> FaceCut:
    """What is cut from a picture of ``size`` for one of its faces.

    Without a crop the whole picture stays. The picture is scaled to cover the crop if it is smaller, with
    ``resize_fit`` in any case, and with ``resize_face_size`` so that the face gets that size, unless the picture would
    then be smaller than the crop. The box lies around the face as far as the picture reaches.
    """
    crop = rules.crop_size
    if rules.crop_ratio is not None:
        crop = round(face.side * rules.crop_ratio[0]), round(face.side * rules.crop_ratio[1])
    cover = max(crop[0] / size[0], crop[1] / size[1]) if crop is not None else 0.0
    wanted = 1.0
    if rules.resize_face_size is not None:
        wanted = rules.resize_face_size / face.side
    elif rules.resize_fit and crop is not None:
        wanted = cover
    factor = max(wanted, cover)
    scaled = round(size[0] * factor), round(size[1] * factor)
    if crop is not None:
        scaled = max(scaled[0], crop[0]), max(scaled[1], crop[1])
    face = face.scaled(factor)
    over = rules.resize_face_size is not None and factor > wanted
    if crop is None:
        return FaceCut(scaled, (0, 0), scaled, face, over)
    left, top = (min(max(round(face.center[axis] - crop[axis] / 2), 0), scaled[axis] - crop[axis]) for axis in (0, 1))
    return FaceCut(scaled, (left, top), crop, face.moved(left, top), over)


def turned(pixels_HWC: Pixels, face: Face) -> Pixels:
    """The picture turned about the face so that its eyes are level; the canvas stays, its border is mirrored."""
    height, width = pixels_HWC.shape[:2]
    matrix = cv2.getRotationMatrix2D(face.center, face.angle, 1.0)
    result = cv2.warpAffine(
        pixels_HWC, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    return np.asarray(result, np.uint8)


def cut_out(pixels_HWC: Pixels, face: Face, rules: CutRules) -> tuple[Pixels, FaceCut]:
    """The picture of one face, and how it was made. ``pixels_HWC`` is not changed."""
    height, width = pixels_HWC.shape[:2]
    if rules.rotate and face.angle:
        pixels_HWC = turned(pixels_HWC, face)
    cut = plan_cut((width, height), face, rules)
    if cut.scaled != (width, height):
        smaller = cut.scaled[0] * cut.scaled[1] < width * height
        how = cv2.INTER_AREA if smaller else cv2.INTER_LANCZOS4
        pixels_HWC = np.asarray(cv2.resize(pixels_HWC, cut.scaled, interpolation=how), np.uint8)
    left, top = cut.left_top
    return pixels_HWC[top : top + cut.size[1], left : left + cut.size[0]], cut


def result_name(stem: str, face: Face, number: int | None) -> str:
    """``<stem>[_NN]_cx_cy_w_h``: what training reads from a name for crops around faces."""
    numbers = (*face.center, *face.size)
    place = "_".join(f"{max(0, int(value)):04d}" for value in numbers)
    return f"{stem}_{place}" if number is None else f"{stem}_{number:02d}_{place}"
