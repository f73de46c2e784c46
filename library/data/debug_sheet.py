"""--debug_dataset: picture sheets and a text file that show what the model would see."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from library.checkpoint.io import atomic_path, atomic_write_text
from library.data.dataset import TrainImages
from library.data.records import LATENT_STRIDE, Batch, CaptionClock, MicroBatch, Size, StepPlan

_COLUMNS = 4
_LONGEST_SIDE = 384  # of a picture on a sheet, in pixels
_TEXT_LINES = 7
_LINE_HEIGHT = 14
_CHARACTER_WIDTH = 6.5
_GAP = 8
_INK = (20, 20, 20)
_FAINT_INK = (110, 110, 110)


@dataclass(frozen=True, slots=True)
class _Shown:
    """One sample as it is drawn and described."""

    pixels_HWC: np.ndarray
    facts: str
    caption: str
    key: str


def write_debug_sheets(
    images: TrainImages, plan: Iterable[StepPlan], folder: Path, clock: CaptionClock, batches_per_bucket: int = 2
) -> list[Path]:
    """Draw the first batches of each bucket of each data set into PNG sheets; captions go to ``captions.txt`` too.

    ``images`` must give pixels (no latent store); ``plan`` is an epoch of one process. Returns the files written.
    Raises UserError as `TrainImages.load` does.
    """
    written: list[Path] = []
    text: list[str] = []
    chosen: dict[tuple[int, Size], list[MicroBatch]] = {}
    for micro in (micro for step in plan for micro in step.micro_batches):
        bucket = images.datasets[micro.dataset].fits[micro.samples[0].record].bucket
        batches = chosen.setdefault((micro.dataset, bucket), [])
        if len(batches) < batches_per_bucket:
            batches.append(micro)
    for (dataset, (width, height)), batches in sorted(chosen.items()):
        for number, micro in enumerate(batches, start=1):
            shown = _shown(images.load(micro, 0, 1, clock))
            path = folder / f"dataset{dataset + 1}_{width}x{height}_batch{number}.png"
            with atomic_path(path) as temporary:
                _draw(shown).save(temporary, format="PNG")
            written.append(path)
            text.append(f"== {path.name}")
            text += [f"{one.key}\n  {one.facts}\n  caption: {one.caption}" for one in shown]
    captions = folder / "captions.txt"
    atomic_write_text(captions, "\n".join(text) + "\n")
    return [*written, captions]


def _shown(batch: Batch) -> list[_Shown]:
    assert batch.images_BCHW is not None
    pixels_BHWC = images_BHWC = _pixels(batch.images_BCHW)
    if batch.conditioning_images_BCHW is not None:  # beside the image
        pixels_BHWC = np.concatenate([pixels_BHWC, _pixels(batch.conditioning_images_BCHW)], axis=2)
    if batch.loss_masks_BHW is not None:  # beside it, with what does not count in the loss in black
        pixels_BHWC = np.concatenate([pixels_BHWC, _masked(images_BHWC, batch.loss_masks_BHW)], axis=2)
    repeats = Counter(batch.keys)
    shown: list[_Shown] = []
    for index, key in enumerate(batch.keys):
        height, width = batch.original_sizes_hw_B2[index].tolist()
        top, left = batch.crop_top_lefts_B2[index].tolist()
        facts = [f"{width}x{height}", f"crop at {left},{top}", f"weight {batch.loss_weights_B[index].item():g}"]
        facts += ["mirrored"] if batch.flipped[index] else []
        facts += [f"{repeats[key]} times in this batch"] if repeats[key] > 1 else []
        shown.append(_Shown(pixels_BHWC[index], ", ".join(facts), batch.captions[index], key))
    return shown


def _pixels(images_BCHW: torch.Tensor) -> np.ndarray:
    return ((images_BCHW + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _masked(pixels_BHWC: np.ndarray, masks_Bhw: torch.Tensor) -> np.ndarray:
    """The pictures times their masks, of which a cell is 8 x 8 pixels."""
    masks_BHW = masks_Bhw.numpy().repeat(LATENT_STRIDE, axis=1).repeat(LATENT_STRIDE, axis=2)
    _, height, width = masks_BHW.shape
    masked_BHWC = np.zeros_like(pixels_BHWC)
    masked_BHWC[:, :height, :width] = np.rint(pixels_BHWC[:, :height, :width] * masks_BHW[..., None])
    return masked_BHWC


def _draw(shown: Sequence[_Shown]) -> Image.Image:
    height, width = shown[0].pixels_HWC.shape[:2]
    scale = min(1.0, _LONGEST_SIDE / max(width, height))
    picture = (max(1, round(width * scale)), max(1, round(height * scale)))
    cell_width = max(picture[0], 192) + _GAP
    cell_height = picture[1] + _TEXT_LINES * _LINE_HEIGHT + 2 * _GAP
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for index, one in enumerate(shown):
        x, y = _GAP + (index % columns) * cell_width, _GAP + (index // columns) * cell_height
        sheet.paste(Image.fromarray(one.pixels_HWC).resize(picture, Image.Resampling.LANCZOS), (x, y))
        letters = int((cell_width - _GAP) / _CHARACTER_WIDTH)
        lines = textwrap.wrap(f"{Path(one.key).name}: {one.facts}", letters)[:3]
        caption = textwrap.wrap(one.caption or "(empty caption)", letters)
        room = _TEXT_LINES - len(lines)
        if len(caption) > room:
            caption = [*caption[: room - 1], caption[room - 1][: letters - 4] + " ..."]
        for number, line in enumerate([*lines, *caption]):
            ink = _FAINT_INK if number < len(lines) else _INK
            pen.text((x, y + picture[1] + 4 + number * _LINE_HEIGHT), _printable(line), fill=ink, font=font)
    return sheet


def _printable(line: str) -> str:
    """Pillow's own small font has no letters beyond Latin ones; the text file has all."""
    return line.encode("latin-1", "replace").decode("latin-1")
