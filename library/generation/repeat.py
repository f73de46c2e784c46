"""Pictures drawn once more (``--from_image``), from what is written in them. Options of the command line win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from library.generation.early import check_before_loading
from library.generation.inputs import InputFiles, find_again
from library.generation.jobs import Job, overruled
from library.generation.model import load_model
from library.generation.output import Writer, read_recipe
from library.generation.session import Session, input_files
from library.interrupt import StopRequest, stop_on_signals
from library.log import UserError
from library.options.generation import DrawOptions, GenModelOptions, OutputOptions, PromptOptions
from library.options.settings import Settings

LARGEST_BATCH = 4096  # a damaged number must not fill the memory


@dataclass(frozen=True)
class Repeat:
    """A picture to draw again: its job, the options of then and now, and its place in a batch of ``count``.

    ``given``: the options of now alone.
    """

    job: Job
    settings: Settings
    given: Mapping[str, Any]
    place: int
    count: int


def repeat_pictures(settings: Settings) -> int:
    """Draw the pictures of ``--from_image`` again. Returns the exit status.

    Raises UserError for all that cannot be repeated, before anything is drawn.
    """
    if settings[PromptOptions].dry_run:
        raise UserError("--dry_run shows prompts; leave it out with --from_image")
    repeats, problems = list[Repeat](), list[str]()
    for path in settings[PromptOptions].from_image or ():
        try:
            repeats.append(read_repeat(settings, path))
            check_before_loading(repeats[-1].settings)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError.of(dict.fromkeys(problems))
    writer, failed = Writer(settings[OutputOptions]), 0
    with stop_on_signals("stopping after this picture") as stop:
        for _, alike in groupby(repeats, lambda repeat: repeat.settings.as_flat_dict()):
            failed = max(failed, _draw(list(alike), stop, writer))
            if stop.is_set:
                break
    return failed


def read_repeat(settings: Settings, path: str) -> Repeat:
    """What a picture tells, and the options given now in place of those that it tells. Raises UserError."""
    job, recipe = read_recipe(path)
    job = find_again(job, input_files(settings, repeating=True))
    given = {name: value for name, value in settings.as_flat_dict().items() if settings.given(name)}
    try:
        told = {name: value for name, value in recipe["options"].items() if not settings.given(name)}
        if job.mask is not None:  # regions are only made where masks are spoken of, however the mask was found
            told["mask_path"] = job.mask
        # what was told is no default: the new picture has to tell it as well
        sources = {**dict.fromkeys(told, path), **{name: settings.source_of(name) for name in given}}
        place, count = recipe.get("place", (0, 1))
        if not (type(place) is type(count) is int and 0 <= place < count <= LARGEST_BATCH):
            raise ValueError(f"place is {[place, count]}")
        return Repeat(job, Settings(settings.script, {**told, **given}, sources), given, place, count)
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"--from_image {path}: what it tells of its making is damaged ({error})") from error


def _draw(alike: Sequence[Repeat], stop: StopRequest, writer: Writer) -> int:
    """Pictures with the same options, from a model that is loaded once."""
    settings, failed = alike[0].settings, 0
    model = load_model(settings[GenModelOptions], settings[DrawOptions])
    session = Session(settings, model, stop, InputFiles(), writer)
    for repeat in alike:
        job = overruled(repeat.job, repeat.given, session.defaults)
        job = replace(job, shared=session.engine.with_rows(job.shared, job.prompt, job.negative_prompt))
        # in a batch of the same size: products of other shapes round differently
        failed = session.draw([[job] * repeat.count], only=repeat.place)
        if stop.is_set:
            break
    return failed
