"""Looking on: a small picture of the latents while they are drawn, and finished pictures in a window."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from library.generation.denoise import Setup
from library.generation.output import write_png
from library.generation.pictures import to_picture
from library.log import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

PREVIEW_FILE = "preview.png"
SMALLER = 4  # the preview's sides are this many times shorter, so the VAE has little to do
WINDOW_TITLE_LENGTH = 128


class Preview:
    """Extension: every few steps a small picture of the first latents of the batch is written to ``folder``.

    ``decode``: latents (1, C, h, w) -> picture (1, 3, height, width) in -1..1.
    """

    def __init__(self, folder: Path, every_n_steps: int, decode: Callable[[Tensor], Tensor]) -> None:
        self._path = folder / PREVIEW_FILE
        self._every = every_n_steps
        self._decode = decode

    @contextmanager
    def __call__(self, setup: Setup) -> Generator[None]:
        setup.after_step.append(self._after_step)
        yield

    def _after_step(self, latents_BCHW: Tensor, call: int) -> Tensor:
        if (call + 1) % self._every == 0:
            try:
                write_png(self._small(latents_BCHW[:1]), self._path, {})
            except (OSError, RuntimeError) as error:  # looking on must not end the drawing
                logger.warning("the preview could not be made: %s", error)
        return latents_BCHW

    @torch.no_grad()
    def _small(self, latents_1CHW: Tensor) -> Image:
        height, width = latents_1CHW.shape[-2:]
        size = (max(8, height // SMALLER), max(8, width // SMALLER))
        # noisy latents are larger than clean ones; the VAE expects the spread of clean ones
        scaled = latents_1CHW / latents_1CHW.std().clamp(min=1)
        return to_picture(self._decode(F.interpolate(scaled, size=size, mode="area")))


class Window:
    """Shows finished pictures. The first failure (no display, an OpenCV without windows) switches it off."""

    def __init__(self) -> None:
        self._works = True

    def show(self, picture: Image, title: str) -> None:
        """Show a picture and wait for a key."""
        if not self._works:
            return
        try:
            import cv2
            import numpy as np

            cv2.imshow(title[:WINDOW_TITLE_LENGTH], np.asarray(picture)[:, :, ::-1])
            cv2.waitKey()
            cv2.destroyAllWindows()
        except Exception as error:  # whatever is wrong with windows here, the pictures are on the disk
            self._works = False
            logger.warning("no preview window here (%s); --no_preview leaves it out", first_line(error))
