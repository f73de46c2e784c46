"""Where an image counts in the loss: weights made of a mask picture, or of the image's own transparency.

H W pixel height and width, h w latent height and width (an eighth). Masks lie on disk as pictures only and are read
anew by each run, never from a cache of latents that has its image beside it: a mask that was changed is always seen.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from library.data.cache_files import ALPHA_MASK, BrokenArchive, latent_shape, read_array
from library.data.images import Cut, Pixels, UnreadableImage, alpha_of, fit_alike, read_pixels
from library.data.records import LATENT_STRIDE, ImageRecord, SubsetSpec

logger = logging.getLogger(__name__)


class Masks:
    """The masks of a run's images. ``kept`` ones, whose latents need no file either, are read once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Cut], torch.Tensor | None] = {}
        self._told: set[str] = set()

    def kept(self, record: ImageRecord, subset: SubsetSpec, cut: Cut) -> torch.Tensor | None:
        """See `read`; the same mask in the same cut is remembered."""
        key = record.key, cut
        if key not in self._kept:
            self._kept[key] = self.read(record, subset, cut)
        return self._kept[key]

    def read(
        self, record: ImageRecord, subset: SubsetSpec, cut: Cut, pixels_HWC: Pixels | None = None
    ) -> torch.Tensor | None:
        """Weights hw (uint8, 255 counts fully) for the loss of an image that was cut so; None if it has no mask.

        A mask picture's weight is its red channel (of a grey picture its brightness), and 0 where it is transparent.
        Without one the weight is the image's opacity, if its subset asks for that; ``pixels_HWC``: the image as
        `read_pixels` gives it, if it is known. Raises `UnreadableImage`.
        """
        if record.mask_path is not None:
            source, mask_HW = record.mask_path, _red(read_pixels(record.mask_path))
        elif not subset.uses_alpha:
            return None
        elif record.path == record.npz_path:
            return _of_archive(record.path, cut)
        else:
            source, mask_HW = record.path, alpha_of(read_pixels(record.path) if pixels_HWC is None else pixels_HWC)
        if mask_HW is None:
            return None
        if not mask_HW.any() and source not in self._told:
            self._told.add(source)
            logger.warning("%s: the mask is 0 everywhere, so nothing of the image is learned", source)
        return cell_weights(fit_alike(mask_HW, cut), cut)


def has_mask(record: ImageRecord, subset: SubsetSpec) -> bool:
    """True if a mask has to be looked for when the image is loaded."""
    return record.mask_path is not None or subset.uses_alpha


def cell_weights(mask_HW: Pixels, cut: Cut) -> torch.Tensor:
    """Mean of the 8 x 8 pixels that each latent stands for, rounded to whole 255ths (uint8 hw).

    As in the VAE, pixels right of and below the last whole 8 belong to no latent.
    """
    _, rows, columns = latent_shape(cut.bucket)
    stride = LATENT_STRIDE
    blocks = mask_HW[: rows * stride, : columns * stride].reshape(rows, stride, columns, stride)
    return torch.from_numpy(np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8))


def _red(pixels_HWC: Pixels) -> Pixels:
    red_HW, alpha_HW = pixels_HWC[:, :, 0], alpha_of(pixels_HWC)
    if alpha_HW is None:
        return np.ascontiguousarray(red_HW)
    return ((red_HW.astype(np.uint16) * alpha_HW + 127) // 255).astype(np.uint8)


def _of_archive(path: str, cut: Cut) -> torch.Tensor:
    """The mask of an archive: 0..1, of the size of the training pixels or of the latents, not mirrored."""
    width, height = cut.bucket
    _, rows, columns = latent_shape(cut.bucket)
    try:
        found: NDArray[np.generic] = read_array(Path(path), ALPHA_MASK)
    except BrokenArchive as error:
        raise UnreadableImage(path, f"its {ALPHA_MASK} cannot be read") from error
    if found.shape not in ((height, width), (rows, columns)):
        raise UnreadableImage(path, f"its {ALPHA_MASK} is of another size than its latents")
    mask = np.rint(np.clip(found.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    mask = np.ascontiguousarray(mask[:, ::-1] if cut.flipped else mask)
    return torch.from_numpy(mask) if mask.shape == (rows, columns) else cell_weights(mask, cut)
