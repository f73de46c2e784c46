"""WD14 taggers: pictures in, scores of tags out, and which tags are written. No files, no command line.

Shapes: B pictures, H W pixel height and width, C = 3 colours in the order blue, green, red, N tags of the model.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from library.data.images import Pixels
from library.log import UserError

GENERAL, CHARACTER, RATING = 0, 4, 9  # categories of selected_tags.csv
_USUAL_SIDE_PX = 448
_SHORT_TAG = 3  # letters: emoticons such as ^_^ keep their underscore


class Session(Protocol):
    """What is used of an onnxruntime.InferenceSession."""

    def get_inputs(self) -> Sequence[Any]:
        """The inputs: name, shape (numbers, or names and None where it is free)."""
        ...

    def run(self, output_names: Sequence[str] | None, input_feed: dict[str, Any]) -> Sequence[Any]:
        """The outputs for inputs by name."""
        ...


@dataclass(frozen=True)
class Tagger:
    """An ONNX model with the form of its input. ``batch``: the number of pictures it insists on, None for any."""

    session: Session
    input_name: str
    side: int
    channels_first: bool
    batch: int | None

    @classmethod
    def of(cls, session: Session) -> Tagger:
        """Read the form of the input from the model. Raises UserError if it takes no pictures."""
        entry = session.get_inputs()[0]
        shape = list(entry.shape)
        if len(shape) != 4 or 3 not in (shape[1], shape[3]):
            raise UserError(f"model.onnx: takes {shape}, not batches of pictures with three colours; is it a tagger?")
        channels_first = shape[3] != 3
        height = shape[2 if channels_first else 1]
        side = height if isinstance(height, int) and height > 0 else _USUAL_SIDE_PX
        batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        return cls(session, str(entry.name), side, channels_first, batch)

    def prepare(self, pixels_HWC: Pixels) -> NDArray[np.float32]:
        """A picture HWC as the model wants it, 0..255: centred on a white square, scaled."""
        height, width = pixels_HWC.shape[:2]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = np.full((side, side, 3), 255, np.uint8)
        square[top : top + height, left : left + width] = pixels_HWC[:, :, ::-1]
        how = cv2.INTER_AREA if side > self.side else cv2.INTER_LANCZOS4
        return cv2.resize(square, (self.side, self.side), interpolation=how).astype(np.float32)

    def scores(self, pictures: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Scores BN of prepared pictures, in 0..1; a fixed batch is filled up with black pictures."""
        size = self.batch or len(pictures)
        parts: list[NDArray[np.float32]] = []
        for start in range(0, len(pictures), size):
            chunk = np.stack(pictures[start : start + size])
            filled = np.zeros((size, *chunk.shape[1:]), np.float32)
            filled[: len(chunk)] = chunk
            batch = filled.transpose(0, 3, 1, 2) if self.channels_first else filled
            found = self.session.run(None, {self.input_name: np.ascontiguousarray(batch)})[0]
            parts.append(np.asarray(found, np.float32)[: len(chunk)])
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class TagNames:
    """The tags of a model in the order of its scores, with the category of each."""

    names: tuple[str, ...]
    categories: tuple[int, ...]

    def places(self, category: int) -> list[int]:
        """Where the tags of a category stand."""
        return [place for place, found in enumerate(self.categories) if found == category]


def read_tag_names(path: Path) -> TagNames:
    """The table that comes with a model (selected_tags.csv). Raises UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        if not rows or rows[0][:3] != ["tag_id", "name", "category"]:
            raise ValueError("its first line must begin with tag_id,name,category")
        return TagNames(tuple(row[1] for row in rows[1:]), tuple(int(row[2]) for row in rows[1:]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: is no table of tags ({error}); --force_download fetches it again") from error


@dataclass(frozen=True, slots=True)
class TagRules:
    """Which tags are written, and how. ``separator`` stands between them; without its blanks it also splits."""

    general_threshold: float
    character_threshold: float
    separator: str = ", "
    remove_underscore: bool = False
    undesired: frozenset[str] = frozenset()
    use_rating_tags: bool = False
    character_tags_first: bool = False

    def split(self, text: str) -> list[str]:
        """The tags of a text, without blanks around them; a separator of blanks alone splits at blanks."""
        mark = self.separator.strip()
        return [tag for part in (text.split(mark) if mark else text.split()) if (tag := part.strip())]


@dataclass
class TagChooser:
    """Turns scores into tags, and counts them. Raises UserError if the table is another model's."""

    table: TagNames
    rules: TagRules
    counts: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        self._shown = [self._written(name) for name in self.table.names]
        general = (GENERAL, self.rules.general_threshold)
        character = (CHARACTER, self.rules.character_threshold)
        order = (character, general) if self.rules.character_tags_first else (general, character)
        self._groups = [(np.array(self.table.places(category), int), limit) for category, limit in order]
        self._ratings = np.array(self.table.places(RATING), int)

    def choose(self, scores_N: NDArray[np.float32]) -> list[str]:
        """The tags of one picture: in the order of the table, undesired ones left out."""
        if len(scores_N) != len(self.table.names):
            raise UserError(
                f"the model gives {len(scores_N)} scores, selected_tags.csv has {len(self.table.names)} tags: they "
                "belong to different models; --force_download fetches both"
            )
        places: list[int] = []
        if self.rules.use_rating_tags and len(self._ratings):
            places.append(int(self._ratings[scores_N[self._ratings].argmax()]))
        for group, limit in self._groups:
            places += group[scores_N[group] >= limit].tolist()
        tags = [tag for place in places if (tag := self._shown[place]) not in self.rules.undesired]
        self.counts.update(tags)
        return tags

    def _written(self, name: str) -> str:
        spaced = self.rules.remove_underscore and len(name) > _SHORT_TAG
        return name.replace("_", " ") if spaced else name


def joined(existing: Iterable[str], new: Iterable[str], rules: TagRules) -> str:
    """Old and new tags as one text; each once, the old ones first."""
    return rules.separator.join(dict.fromkeys([*existing, *new]))
