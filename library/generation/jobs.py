"""From prompt lines to jobs: one picture each, with everything that decides how it looks; and jobs to batches.

Precedence is in-line option, then command line, then the model's default, for each picture anew.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from library.generation.lines import SWITCHED_OFF, PromptLine, unsharp_params
from library.generation.pictures import drawn_size
from library.log import UserError
from library.options.generation import DrawOptions, HighresOptions, PictureOptions
from library.options.settings import Settings

DEFAULT_STRENGTH = 0.8
DEFAULT_SHRINK_DEPTH = 3
DEFAULT_TIMESTEPS = 650
AND = " AND "


@dataclass(frozen=True, slots=True)
class SizeCondition:
    """What an SDXL picture is told of its making, in pixels; None: as if it were an uncropped original of its size."""

    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None


@dataclass(frozen=True, slots=True)
class DeepShrink:
    """Before block ``depth_1`` the picture is made smaller by ``ratio`` while the timestep is at least ``timesteps_1``,
    then before ``depth_2`` down to ``timesteps_2``.
    """

    depth_1: int
    timesteps_1: int
    depth_2: int | None
    timesteps_2: int
    ratio: float


@dataclass(frozen=True, slots=True)
class GradualLatent:
    """The latents begin at ``ratio`` of their size and grow by ``ratio_step`` every few steps below ``timesteps``.

    ``unsharp``: ksize, sigma, strength, and whether the target (1) or the source (0) is sharpened.
    """

    timesteps: int
    ratio: float
    ratio_step: float
    every_n_steps: int
    s_noise: float
    unsharp: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Shared:
    """What all pictures of one batch share.

    ``regional``: the mask says where each of the ``parts`` (sub-prompts joined by AND) and networks acts. ``rows``:
    rows of 75 tokens.
    """

    width: int
    height: int
    steps: int
    sampler: str
    scale: float
    negative_scale: float | None = None
    strength: float = DEFAULT_STRENGTH
    sizes: SizeCondition = field(default_factory=SizeCondition)
    multipliers: tuple[float, ...] = ()
    parts: int = 1
    regional: bool = False
    rows: int = 1
    deep_shrink: DeepShrink | None = None
    gradual_latent: GradualLatent | None = None

    def for_text(self, part: int | None) -> Shared:
        """What holds while a text is encoded, a sub-prompt or (None) one that belongs to no region.

        With regions a network changes the text of its own sub-prompt only.
        """
        if not self.regional:
            return self
        own = tuple(value if index == part else 0.0 for index, value in enumerate(self.multipliers))
        return replace(self, multipliers=own)


@dataclass(frozen=True, slots=True)
class Job:
    """One picture. ``number`` counts from 0; ``source``, ``mask`` and ``guides`` are files."""

    number: int
    raw: str
    prompt: str
    negative_prompt: str
    seed: int
    shared: Shared
    clip_prompt: str | None = None
    source: str | None = None
    mask: str | None = None
    guides: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The sub-prompts; the prompt alone if there are none."""
        return texts_of(self.prompt, self.shared)


def texts_of(prompt: str, shared: Shared) -> tuple[str, ...]:
    """The sub-prompts of a prompt; the prompt itself where AND has no meaning."""
    return tuple(prompt.split(AND)) if shared.parts > 1 else (prompt,)


@dataclass(frozen=True)
class Defaults:
    """What the command line and the model say. ``size_step``: sides are made multiples of it, in pixels.

    ``has_masks``, ``has_sources``: jobs are given masks, and pictures to begin from.
    """

    options: Mapping[str, Any]
    usual_size: int
    size_step: int
    network_multipliers: tuple[float, ...] = ()
    has_masks: bool = False
    has_sources: bool = False


def defaults_of(settings: Settings, usual_size: int, size_step: int, multipliers: Sequence[float] = ()) -> Defaults:
    """Defaults from the options of a run."""
    groups = (DrawOptions, HighresOptions, PictureOptions)
    values = {name: value for group in groups for name, value in vars(settings[group]).items()}
    text = values["gradual_latent_unsharp_params"]
    if text is not None:
        try:
            values["gradual_latent_unsharp_params"] = unsharp_params(tuple(float(part) for part in text.split(",")))
        except ValueError:
            raise UserError(f"--gradual_latent_unsharp_params {text}: must be numbers separated by commas") from None
    has_masks, has_sources = values["mask_path"] is not None, values["image_path"] is not None
    return Defaults(values, usual_size, size_step, tuple(multipliers), has_masks, has_sources)


def settle(line: PromptLine, defaults: Defaults, picture: tuple[int, int] | None = None) -> tuple[Shared, list[str]]:
    """Everything but seed and files for a line, and notes about what had to be changed. Raises UserError.

    ``picture``: width and height of what it begins from, which count where the line and the command line say nothing.
    """
    options, notes = {**defaults.options}, list(line.notes)
    options.update({"width": options["W"], "height": options["H"]})
    options.update({name: value for name, value in line.options.items() if name not in _OWN_MERGE})
    if picture is not None:
        _take_size(picture, options, defaults, notes)
    negative_scale = None if options["negative_scale"] == SWITCHED_OFF else options["negative_scale"]
    if negative_scale is not None and options["scale"] <= 1:
        notes.append("a negative scale does nothing without guidance (a scale above 1)")
        negative_scale = None
    parts, regional = _regions(line, defaults, notes)
    shared = Shared(
        width=_side(options["width"], "--w", defaults, notes),
        height=_side(options["height"], "--h", defaults, notes),
        steps=options["steps"],
        sampler=options["sampler"],
        scale=options["scale"],
        negative_scale=negative_scale,
        strength=DEFAULT_STRENGTH if options["strength"] is None else options["strength"],
        sizes=SizeCondition(**{name: options[name] for name in _SIZES}),
        multipliers=_multipliers(line, defaults, notes),
        parts=parts,
        regional=regional,
        deep_shrink=_deep_shrink(line.options, defaults.options),
        gradual_latent=_gradual_latent(line.options, defaults.options),
    )
    return shared, notes


def overruled(job: Job, given: Mapping[str, Any], defaults: Defaults) -> Job:
    """A job of earlier with what the command line says now. ``given``: its options, without those at their default."""
    said = {name: value for name, value in given.items() if value is not None}
    own = {_SHARED_NAMES.get(name, name): said[name] for name in (*_SHARED_NAMES, *_SHARED) if name in said}
    own.update({name: _side(own[name], name, defaults, []) for name in ("width", "height") if name in own})
    if said.keys() & set(_SHRINK):
        own["deep_shrink"] = _deep_shrink({}, defaults.options)
    if said.keys() & set(_GRADUAL):
        own["gradual_latent"] = _gradual_latent({}, defaults.options)
    if "network_mul" in said:
        own["multipliers"] = defaults.network_multipliers
    sizes = replace(job.shared.sizes, **{name: said[name] for name in _SIZES if name in said})
    return replace(job, shared=replace(job.shared, sizes=sizes, **own), seed=said.get("seed", job.seed))


_SIZES = tuple(SizeCondition.__dataclass_fields__)
_SHARED = ("steps", "sampler", "scale", "negative_scale", "strength")
_SHARED_NAMES = {"W": "width", "H": "height"}
_SHRINK = ("ds_depth_1", "ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio")
_GRADUAL = (
    "gradual_latent_timesteps",
    "gradual_latent_ratio",
    "gradual_latent_ratio_step",
    "gradual_latent_every_n_steps",
    "gradual_latent_s_noise",
    "gradual_latent_unsharp_params",
)
_OWN_MERGE = (*_SHRINK, *_GRADUAL, "multipliers", "seeds")


def _take_size(picture: tuple[int, int], options: dict[str, Any], defaults: Defaults, notes: list[str]) -> None:
    """The size of a picture for a side that is not said."""
    said = options["width"], options["height"]
    width, height = drawn_size(picture, *said, defaults.size_step)
    if said == (None, None) and (width, height) != picture:
        notes.append(
            f"the picture of {picture[0]}x{picture[1]} pixels is drawn at {width}x{height}: "
            f"sides must be multiples of {defaults.size_step}"
        )
    options.update({"width": said[0] or width, "height": said[1] or height})


def _side(given: int | None, name: str, defaults: Defaults, notes: list[str]) -> int:
    if given is None:
        return defaults.usual_size
    side = max(defaults.size_step, given // defaults.size_step * defaults.size_step)
    if side != given:
        notes.append(f"{name} {given}: must be a multiple of {defaults.size_step}; {side} is drawn")
    return side


def _multipliers(line: PromptLine, defaults: Defaults, notes: list[str]) -> tuple[float, ...]:
    given, count = line.options.get("multipliers"), len(defaults.network_multipliers)
    if given is None:
        return defaults.network_multipliers
    if len(given) > count:
        notes.append(f"--am has {len(given)} numbers for {count} networks; the rest is ignored")
    elif len(given) < count:
        notes.append(f"--am has {len(given)} numbers for {count} networks; the last one is for the rest")
    return tuple((*given, *[given[-1]] * count)[:count])


def _regions(line: PromptLine, defaults: Defaults, notes: list[str]) -> tuple[int, bool]:
    """Number of sub-prompts, and whether the mask divides the picture among them and the networks. Raises UserError.

    A mask without AND is for inpainting if there is a picture to begin from, else it says where the networks act.
    """
    parts, networks = len(line.prompt.split(AND)), len(defaults.network_multipliers)
    if parts > 1 and not defaults.has_masks:
        notes.append("AND does nothing without --mask_path, which says where each sub-prompt is; it is taken as a word")
        return 1, False
    if not defaults.has_masks or (parts == 1 and (not networks or defaults.has_sources)):
        return 1, False
    if parts < networks:
        raise UserError(
            f"{networks} networks with --mask_path need as many sub-prompts, joined by AND; there "
            + ("is one" if parts == 1 else f"are {parts}")
        )
    return parts, True


def _merged(names: Iterable[str], given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of a feature for a line, the first of which switches it on; None if it is off."""
    first, *_ = names
    values = {name: given.get(name, options[name]) for name in names}
    if values[first] == SWITCHED_OFF or (values[first] is None and not any(name in given for name in names)):
        return None
    return values


def _deep_shrink(given: Mapping[str, Any], options: Mapping[str, Any]) -> DeepShrink | None:
    values = _merged(_SHRINK, given, options)
    if values is None:
        return None
    first, second = values["ds_depth_1"], values["ds_depth_2"]
    return DeepShrink(
        DEFAULT_SHRINK_DEPTH if first is None else first,
        values["ds_timesteps_1"],
        None if second == SWITCHED_OFF else second,
        values["ds_timesteps_2"],
        values["ds_ratio"],
    )


def _gradual_latent(given: Mapping[str, Any], options: Mapping[str, Any]) -> GradualLatent | None:
    values = _merged(_GRADUAL, given, options)
    if values is None:
        return None
    start, ratio, step, every, noise, unsharp = (values[name] for name in _GRADUAL)
    return GradualLatent(DEFAULT_TIMESTEPS if start is None else start, ratio, step, every, noise, unsharp)


# ---- seeds


class Seeds:
    """Seeds of pictures that name none. With ``seed`` the same row in each run; one picture alone gets it itself."""

    def __init__(self, seed: int | None, alone: bool = False) -> None:
        self._alone = seed if alone else None
        self.source = random.SystemRandom() if seed is None else random.Random(seed)

    def next(self) -> int:
        """The next seed, below 2**32."""
        return self.source.randint(0, 2**32 - 1) if self._alone is None else self._alone


def own_seed(line: PromptLine, index: int) -> int | None:
    """The seed that a line gives its ``index``-th picture: its list, whose last value repeats; None without a list."""
    seeds = line.options.get("seeds")
    return seeds[min(index, len(seeds) - 1)] if seeds else None


# ---- batches


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Neighbours that share what a batch must share, at most ``size`` of them, in order."""
    queue: list[Job] = []
    for job in jobs:
        if queue and (len(queue) == size or queue[-1].shared != job.shared):
            yield queue
            queue = []
        queue.append(job)
    if queue:
        yield queue


def first_stage(job: Job, scale: float, steps: int, strength: float | None, size_step: int) -> Job:
    """The small picture that highres fix begins with: sizes and size conditions times ``scale``."""
    shared = job.shared

    def small(side: int) -> int:
        return max(size_step, int(side * scale + 0.5) // size_step * size_step)

    sizes = {
        name: None if value is None else int(value * scale + 0.5)
        for name, value in ((name, getattr(shared.sizes, name)) for name in _SIZES)
    }
    return replace(
        job,
        shared=replace(
            shared,
            width=small(shared.width),
            height=small(shared.height),
            steps=steps,
            strength=shared.strength if strength is None else strength,
            sizes=SizeCondition(**sizes),
        ),
    )
