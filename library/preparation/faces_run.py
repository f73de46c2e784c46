"""Cutting a folder of pictures by the faces that a detector finds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from library.checkpoint.io import atomic_path
from library.data.images import Pixels, UnreadableImage, read_image
from library.device import choose_device
from library.log import UserError, progress
from library.options.preparation import FaceOptions
from library.preparation.faces import CutRules, Face, cut_out, eye_angle, result_name
from library.preparation.files import find_images
from library.preparation.outcome import Outcome

logger = logging.getLogger(__name__)
Detector = Callable[[Pixels], Sequence[Face]]
LEAST_SCORE = 0.90
RIGHT_EYE, LEFT_EYE = 11, 19  # key points of the package
_BOX_COLOR = (255, 0, 255)


def cut_faces(options: FaceOptions, detector: Detector | None = None) -> Outcome:
    """Write a PNG for each face of each picture. Raises UserError. ``detector`` None: by anime_face_detector.

    Faces are numbered from the largest on if ``multiple_faces`` is set, or where two would have one name. Pictures
    without a face are counted as left alone.
    """
    rules = CutRules(
        options.rotate, options.crop_size, options.crop_ratio, options.resize_face_size, options.resize_fit
    )
    images = find_images(str(options.src_dir))
    target = Path(str(options.dst_dir)).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    detect, outcome, written = detector or _package_detector(), Outcome(), set[str]()
    for path in progress(images, "pictures"):
        try:
            pixels_HWC = read_image(str(path))
            faces = [face for face in detect(pixels_HWC) if _is_wanted(face, options)]
        except UnreadableImage as error:
            outcome.fail(error.path, error.reason)
            continue
        faces.sort(key=lambda face: -face.side)
        logger.log(logging.INFO if faces else logging.WARNING, "%s: %d faces", path.name, len(faces))
        outcome.done += bool(faces)
        outcome.skipped += not faces
        for number, face in enumerate(faces, 1):
            result_HWC, cut = cut_out(pixels_HWC, face, rules)
            if cut.enlarged_over_face_size:
                logger.warning("%s: the face gets larger than asked for, to fill the crop", path.name)
            if options.debug:
                result_HWC = _with_box(result_HWC, cut.face)
            name = _new_name(path.stem, cut.face, number, options.multiple_faces, written)
            written.add(name)
            with atomic_path(target / f"{name}.png", durable=False) as temporary:
                Image.fromarray(result_HWC).save(temporary)
    return outcome


def _new_name(stem: str, face: Face, number: int, numbered: bool, written: Container[str]) -> str:
    """A name that no result of this run has: faces of one size in cuts of one size would have the same."""
    name = result_name(stem, face, number if numbered else None)
    while name in written:
        name, number = result_name(stem, face, number), number + 1
    return name


def _is_wanted(face: Face, options: FaceOptions) -> bool:
    low, high = options.min_size, options.max_size
    return (low is None or face.side >= low) and (high is None or face.side < high)


def _with_box(pixels_HWC: Pixels, face: Face) -> Pixels:
    (x, y), (width, height) = face.center, face.size
    corners = (round(x - width / 2), round(y - height / 2)), (round(x + width / 2), round(y + height / 2))
    return np.asarray(cv2.rectangle(np.ascontiguousarray(pixels_HWC), *corners, _BOX_COLOR, 2), np.uint8)


def _package_detector() -> Detector:
    try:
        from anime_face_detector import create_detector  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "finding faces needs the package anime-face-detector: pip install anime-face-detector (it needs mmcv, "
            "mmdet and mmpose)"
        ) from error
    model: Any = create_detector("yolov3", device=str(choose_device()))

    def detect(pixels_HWC: Pixels) -> list[Face]:
        found = model(np.ascontiguousarray(pixels_HWC[:, :, ::-1]))  # it wants blue first
        return [face_of(one["bbox"], one["keypoints"]) for one in found if one["bbox"][4] >= LEAST_SCORE]

    return detect


def face_of(box: Sequence[float], points: Sequence[Sequence[float]]) -> Face:
    """A face of the package's answer: box as left, top, right, bottom, score; points as x, y, score."""
    left, top, right, bottom = (float(value) for value in box[:4])
    eyes = [(float(points[place][0]), float(points[place][1])) for place in (RIGHT_EYE, LEFT_EYE)]
    return Face(((left + right) / 2, (top + bottom) / 2), (right - left, bottom - top), eye_angle(*eyes))
