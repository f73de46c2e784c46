"""Pictures that jobs are given: what to begin from, masks, guides. Chosen by the number of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.generation.jobs import Job
from library.log import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def list_pictures(name: str, option: str) -> list[str]:
    """The picture, or all pictures of a folder (not of folders in it), sorted. Raises UserError if there are none."""
    path = Path(name).expanduser()
    if path.is_file():
        return [str(path)]
    found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if not found:
        raise UserError(f"--{option} {name}: there is no picture ({', '.join(SUFFIXES)})")
    return found


@dataclass(frozen=True)
class InputFiles:
    """The files of a run. ``nets``: how many guide pictures each job gets, one for each ControlNet."""

    sources: Sequence[str] = ()
    masks: Sequence[str] = ()
    guides: Sequence[str] = ()
    nets: int = 0

    def __post_init__(self) -> None:
        if self.nets and len(self.guides) < self.nets:
            raise UserError(
                f"--guide_image_path: {len(self.guides)} pictures for {self.nets} ControlNets; each needs one"
            )

    def source_of(self, number: int) -> str | None:
        """What a job begins from; the list begins anew at its end."""
        return self.sources[number % len(self.sources)] if self.sources else None

    def mask_of(self, number: int) -> str | None:
        """The mask of a job."""
        return self.masks[number % len(self.masks)] if self.masks else None

    def guides_of(self, number: int) -> tuple[str, ...]:
        """One guide picture for each net: neighbours in the list. Without nets all guides are one after the other."""
        if not self.guides:
            return ()
        size = max(1, self.nets)
        first = size * (number % (len(self.guides) // size))
        return tuple(self.guides[first : first + size])


def find_again(job: Job, picture: InputFiles) -> Job:
    """A job read from a picture, its files found: as they are named, or those of the same name in ``picture``.

    A single given file stands for the one of its kind whatever its name. Raises UserError for what is not here.
    """
    return replace(
        job,
        source=_found(job.source, picture.sources, "image_path"),
        mask=_found(job.mask, picture.masks, "mask_path"),
        guides=tuple(str(_found(guide, picture.guides, "guide_image_path")) for guide in job.guides),
    )


def _found(name: str | None, given: Sequence[str], option: str) -> str | None:
    if name is None:
        return None
    same = [path for path in given if Path(path).name == Path(name).name]
    chosen = same[0] if same else given[0] if len(given) == 1 else name
    if not Path(chosen).is_file():
        raise UserError(f"{name}: the picture was drawn with this file, which is not here; name it with --{option}")
    return chosen
