"""Picture files: their names, what is written in them, and that nothing is overwritten.

The text entries are those that other programs read, in their order; ``sd-trainer`` holds, as JSON, all that is needed
to draw the picture again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

from library.checkpoint.io import atomic_path
from library.checkpoint.privacy import without_folders
from library.generation.jobs import DeepShrink, GradualLatent, Job, Shared, SizeCondition
from library.generation.samplers import MAX_STEPS, SAMPLER_NAMES
from library.log import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.options.generation import OutputOptions

RECIPE = "sd-trainer"
_TOO_LARGE = 2**63
MAX_SIDE = 16384
_NUMBERED = re.compile(r"im_[01]?(\d{6})\.png")


# ---- what is written in a picture


def text_entries(job: Job, sampler: str, recipe: Mapping[str, Any], is_sdxl: bool) -> dict[str, str]:
    """The PNG text entries of a picture. ``sampler`` as the user calls it; ``recipe``: what else decided it."""
    shared = job.shared
    entries = {
        "prompt": job.prompt,
        "seed": str(job.seed),
        "sampler": sampler,
        "steps": str(shared.steps),
        "scale": str(float(shared.scale)),
        "negative-prompt": job.negative_prompt,
    }
    if shared.negative_scale is not None:
        entries["negative-scale"] = str(float(shared.negative_scale))
    if job.clip_prompt:
        entries["clip-prompt"] = job.clip_prompt
    entries["raw-prompt"] = job.raw
    if is_sdxl:
        sizes = shared.sizes
        entries["original-height"], entries["original-width"] = str(sizes.original_height), str(sizes.original_width)
        entries["original-height-negative"] = str(sizes.original_height_negative)
        entries["original-width-negative"] = str(sizes.original_width_negative)
        entries["crop-top"], entries["crop-left"] = str(sizes.crop_top), str(sizes.crop_left)
    values = asdict(job)
    values.update({name: without_folders(values[name]) for name in ("source", "mask", "guides")})
    entries[RECIPE] = json.dumps({"job": values, **recipe}, ensure_ascii=False)
    return entries


def read_recipe(path: str | Path) -> tuple[Job, dict[str, Any]]:
    """The job of a picture that this program drew, and the rest of its recipe. Raises UserError for other files."""
    from PIL import Image as PilImage
    from PIL import UnidentifiedImageError

    try:
        with PilImage.open(path) as image:
            text = image.info.get(RECIPE)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--from_image {path}: cannot be read as a picture ({error})") from error
    if text is None:
        raise UserError(f"--from_image {path}: nothing in it tells how it was drawn; only own pictures can be repeated")
    try:
        recipe = json.loads(text)
        return job_from_json(recipe.pop("job")), recipe
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--from_image {path}: what it tells of its making is damaged ({error})") from error


def job_from_json(values: dict[str, Any]) -> Job:
    """The way back from ``asdict``. Raises KeyError, TypeError or ValueError for anything else."""
    shared = dict(values["shared"])
    shared["sizes"] = SizeCondition(**shared["sizes"])
    shared["multipliers"] = tuple(shared["multipliers"])
    if shared["deep_shrink"]:
        shared["deep_shrink"] = DeepShrink(**shared["deep_shrink"])
    if shared["gradual_latent"]:
        gradual = dict(shared["gradual_latent"])
        gradual["unsharp"] = tuple(gradual["unsharp"]) if gradual["unsharp"] else None
        shared["gradual_latent"] = GradualLatent(**gradual)
    own: dict[str, Any] = {**values, "shared": Shared(**shared), "guides": tuple(values["guides"])}
    job = Job(**own)
    _require_types(job)
    drawn = job.shared
    if not (min(drawn.width, drawn.height) >= 8 and max(drawn.width, drawn.height) <= MAX_SIDE):
        raise ValueError(f"a size of {drawn.width}x{drawn.height} pixels")
    if drawn.sampler not in SAMPLER_NAMES or not 1 <= drawn.steps <= MAX_STEPS:
        raise ValueError(f"{drawn.steps} steps of {drawn.sampler!r}")
    return job


def _require_types(made: Any) -> None:
    """Raise TypeError if a field of a dataclass, or of one in it, is not what it is declared as."""
    for name, kind in get_type_hints(type(made)).items():
        value = getattr(made, name)
        if not _is_of(value, kind):
            raise TypeError(f"{name} is {value!r}")
        if is_dataclass(value):
            _require_types(value)


def _is_of(value: Any, kind: Any) -> bool:
    """``kind``: a class, a union, or a tuple of one kind. Whole numbers are of a size that pictures have use for."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, get_args(kind)[0]) for item in cast(tuple[Any], value))
    if get_args(kind):
        return any(_is_of(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE
    if kind is int:
        return type(value) is int and 0 <= value < _TOO_LARGE
    return type(value) is kind


# ---- names


@dataclass(frozen=True)
class Place:
    """Where in a batch a picture was drawn. ``stage``: "" of one stage, "0" and "1" of the two of highres fix."""

    index: int
    first_number: int
    moment: str
    stage: str = ""


@dataclass
class Writer:
    """Writes pictures in the background, one after the other, under names that are free."""

    options: OutputOptions
    folder: Path = field(init=False)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="write"))
    _pending: list[Future[Path]] = field(default_factory=list)
    _taken: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder = folder = Path(self.options.outdir).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(folder)
        except OSError as error:
            raise UserError(
                f"--outdir {folder}: cannot be used as a folder ({error.strerror}); choose another"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--outdir {folder}: no permission to write in it; choose another folder")
        numbers = [int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))]
        self._first_free = max(numbers, default=0)

    def write(self, picture: Image, job: Job, place: Place, entries: Mapping[str, str]) -> Path:
        """Queue a picture; returns the name that it will have. Raises what an earlier writing raised."""
        self._written()
        path = self.free(self._name(job, place))
        self._taken.add(path)
        self._pending.append(self._pool.submit(write_png, picture, path, dict(entries)))
        return path

    def _name(self, job: Job, place: Place) -> str:
        if self.options.use_original_file_name and job.source:
            return f"{Path(job.source).stem}{'_first' if place.stage == '0' else ''}.png"
        if self.options.sequential_file_name:
            number = self._first_free + place.first_number + place.index + 1
            return f"im_{place.stage}{number:06d}.png"
        return f"im_{place.moment}_{place.stage}{place.index:03d}_{job.seed}.png"

    def free(self, name: str) -> Path:
        """A file of this name in the folder, or the first of ``stem_2``, ``stem_3`` ... that is not taken."""
        path = self.folder / name
        candidate, number = path, 1
        while candidate in self._taken or candidate.exists():
            number += 1
            candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
        return candidate

    def wait(self) -> list[Path]:
        """All files are written when this returns; those that are new. Raises what a writing raised."""
        wait(self._pending)
        return self._written()

    def _written(self) -> list[Path]:
        """The files that were finished meanwhile. Raises what the first failed writing raised."""
        finished = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if future not in finished]
        return [future.result() for future in finished]


def write_png(picture: Image, path: Path, entries: Mapping[str, str]) -> Path:
    """Write a picture with text entries, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in entries.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    with atomic_path(path, durable=False) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
    return path


def now_text() -> str:
    """The moment in local time, as it stands in file names."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime())
