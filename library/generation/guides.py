"""Guide pictures: read, brought to the picture's size, prepared for their nets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from library.data.images import UnreadableImage, read_image
from library.generation.jobs import Job
from library.generation.pictures import resized
from library.generation.preprocess import Preprocessor, unchanged
from library.log import UserError


def guide_pictures(batch: Sequence[Job], place: int, prepare: Preprocessor = unchanged) -> Tensor:
    """The guide pictures of one net for a batch (B, 3, height, width) in 0..1, float32, on the CPU.

    ``place``: which of each job's guides. They are resized by Lanczos to the size that is drawn, then prepared, so that
    edges are as sharp as the net expects. Raises UserError.
    """
    return torch.stack([_guide_picture(job, job.guides[place], prepare) for job in batch])


def _guide_picture(job: Job, path: str, prepare: Preprocessor) -> Tensor:
    from PIL import Image

    try:
        picture = Image.fromarray(read_image(path))
    except UnreadableImage as error:
        raise UserError(f"--guide_image_path {error}") from error
    picture = resized(picture, (job.shared.width, job.shared.height))
    pixels_HW3 = prepare(np.asarray(picture))
    return torch.from_numpy(np.array(pixels_HW3)).permute(2, 0, 1).float() / 255
