"""Checks of a data set file before anything is built from it: keys, places, types, ranges. All problems at once, with
line numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from library.data.records import LATENT_STRIDE, DatasetKind, DatasetSpec
from library.data.spec_keys import CONDITIONING_KEY, FOREIGN_KEYS, KEYS, LEVELS, ONLY_CONTROL, Level, names_at
from library.log import nearest
from library.options.lines import Where

_TOP_LEVEL = ("general", "datasets")
_REQUIRED = {
    DatasetKind.DREAMBOOTH: ("image_dir",),
    DatasetKind.FINETUNE: ("metadata_file",),
    DatasetKind.CONTROL: ("image_dir", CONDITIONING_KEY),
}
_TELLTALES = (CONDITIONING_KEY, "metadata_file")  # keys by which the kinds are told apart
_NOT_FOR_CONTROL = "ControlNet data sets are not for this script; for masks add --masked_loss"
_LEVEL_NAMES: dict[Level, str] = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one place of the file. ``where`` is the way to it: ``("datasets", 0, "resolution")``."""

    where: Where
    message: str
    is_warning: bool = False


def check_document(document: Any, kinds: frozenset[DatasetKind], masks: bool) -> list[Finding]:
    """All that is wrong with the content of a data set file for a script that trains on ``kinds``, in its order.

    ``masks``: `CONDITIONING_KEY` names a folder of masks, which any subset may have.
    """
    if not isinstance(document, dict):
        return [Finding((), "must be a table with the key datasets")]
    findings = [_unknown((name,), _TOP_LEVEL) for name in document if name not in _TOP_LEVEL]
    if "general" in document:
        findings += _check_table(document["general"], ("general",), "general", None)
    datasets = document.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        return [*findings, Finding(("datasets",), "must be a list of at least one table: [[datasets]]")]
    for index, dataset in enumerate(datasets):
        findings += _check_dataset(dataset, ("datasets", index), kinds, masks)
    return findings


def kind_of(dataset: dict[str, Any], kinds: frozenset[DatasetKind], masks: bool) -> DatasetKind | None:
    """The kind that the subsets' keys tell; None if they tell different ones. Where only ControlNets are trained a
    subset that lacks the key of the kind is a mistake, not of another kind. ``masks`` as in `check_document`.
    """
    if kinds == ONLY_CONTROL:
        return DatasetKind.CONTROL
    answers = {_kind_of_subset(subset, masks) for subset in dataset["subsets"]}
    return None if len(answers) > 1 else answers.pop()


def _kind_of_subset(subset: dict[str, Any], masks: bool) -> DatasetKind:
    if CONDITIONING_KEY in subset and not masks:
        return DatasetKind.CONTROL
    return DatasetKind.FINETUNE if "metadata_file" in subset else DatasetKind.DREAMBOOTH


def _check_dataset(dataset: Any, where: Where, kinds: frozenset[DatasetKind], masks: bool) -> Iterator[Finding]:
    if not isinstance(dataset, dict):
        yield Finding(where, "must be a table")
        return
    subsets, place = dataset.get("subsets"), (*where, "subsets")
    if not isinstance(subsets, list) or not subsets or not all(isinstance(subset, dict) for subset in subsets):
        yield Finding(place, "must be a list of at least one table: [[datasets.subsets]]")
        return
    strangers = [index for index, subset in enumerate(subsets) if CONDITIONING_KEY in subset and not masks]
    if strangers and DatasetKind.CONTROL not in kinds:
        for index in strangers:
            yield Finding((*place, index, CONDITIONING_KEY), _NOT_FOR_CONTROL)
        return
    kind = kind_of(dataset, kinds, masks)
    if kind is None:
        telltales = _TELLTALES[1:] if masks else _TELLTALES
        name = next(key for key in telltales if len({key in subset for subset in subsets}) > 1)
        yield Finding(place, f"some have {name} and some have not; put the two kinds into separate [[datasets]]")
        return
    yield from _check_table(
        {name: value for name, value in dataset.items() if name != "subsets"}, where, "dataset", kind
    )
    for index, subset in enumerate(subsets):
        for name in _REQUIRED[kind]:
            if subset.get(name) is None:
                yield Finding((*place, index), f"{name} is missing")
        yield from _check_table(subset, (*place, index), "subset", kind)


def _check_table(table: Any, where: Where, level: Level, kind: DatasetKind | None) -> Iterator[Finding]:
    if not isinstance(table, dict):
        yield Finding(where, "must be a table")
        return
    allowed = names_at(level, kind)
    for name, raw in table.items():
        place = (*where, name)
        if name not in allowed:
            yield _misplaced(place, raw, kind) or _unknown(place, allowed)
            continue
        try:
            if raw is None:
                raise ValueError("must have a value; leave the key out to use the default")
            KEYS[name].read(raw)
        except ValueError as error:
            yield Finding(place, f"is {_shown(raw)}: {error}")


def _misplaced(where: Where, raw: Any, kind: DatasetKind | None) -> Finding | None:
    name = str(where[-1])
    if name in FOREIGN_KEYS:
        return Finding(where, f"is {_shown(raw)}, which has no meaning here and is passed over", is_warning=True)
    if name not in KEYS:
        return None
    if kind is not None and kind not in KEYS[name].kinds:
        return Finding(where, f"has no meaning in a {kind.value} data set; remove it")
    places = " or ".join(_LEVEL_NAMES[level] for level in LEVELS if level in KEYS[name].levels)
    return Finding(where, f"does not belong here; put it into {places}")


def _unknown(where: Where, allowed: Sequence[str]) -> Finding:
    name = str(where[-1])
    hint = nearest(name, allowed) or f"; known here are {', '.join(sorted(allowed))}"
    return Finding(where, f"is not known{hint}")


def _shown(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_sizes(spec: DatasetSpec, where: Where) -> Iterator[Finding]:
    """Sizes and steps that cannot go together."""
    rules = spec.buckets
    if rules is None:
        if spec.kind is not DatasetKind.FINETUNE:
            yield Finding(where, "resolution is missing; set it here, in [general], or as --resolution")
        return
    width, height = rules.resolution
    if min(width, height) < LATENT_STRIDE:
        yield Finding(where, f"resolution {width}x{height}: each side must have at least {LATENT_STRIDE} pixels")
    if not rules.enable_bucket:
        return
    if rules.bucket_reso_steps**2 > width * height:
        yield Finding(
            where, f"bucket_reso_steps {rules.bucket_reso_steps} is larger than the resolution {width}x{height}"
        )
    if rules.bucket_no_upscale:
        return
    if min(width, height) < rules.min_bucket_reso:
        yield Finding(
            where, f"min_bucket_reso {rules.min_bucket_reso} is above the resolution {width}x{height}; lower it"
        )
    if max(width, height) > rules.max_bucket_reso:
        yield Finding(
            where, f"max_bucket_reso {rules.max_bucket_reso} is below the resolution {width}x{height}; raise it"
        )


def uncacheable_subsets(specs: Sequence[DatasetSpec]) -> tuple[str, ...]:
    """One line for each subset whose augmentation needs the pixels at every visit, so that its latents cannot be
    cached.
    """
    lines: list[str] = []
    for spec in specs:
        for subset in spec.subsets:
            names = [name for name in ("color_aug", "random_crop") if getattr(subset.augmentation, name)]
            if names:
                lines.append(
                    f"{subset.name}: {' and '.join(names)} cannot go with cached latents; switch one of them off"
                )
    return tuple(lines)


def uncacheable_captions(specs: Sequence[DatasetSpec], variants: int) -> tuple[str, ...]:
    """One line for each subset whose captions cannot all be known ahead, so that what the text encoders make of them
    cannot be cached. ``variants``: prepared forms of each caption, 0 if none were asked for.
    """
    lines: list[str] = []
    for subset in (subset for spec in specs for subset in spec.subsets):
        rules = subset.captions
        names = rules.varying
        if names and not variants:
            lines.append(
                f"{subset.name}: {' and '.join(names)} cannot go with cached text encoder outputs unless a number of "
                "caption forms is prepared: add --cache_text_encoder_outputs_variants, or switch off what varies"
            )
        if rules.token_warmup_step > 0:
            lines.append(
                f"{subset.name}: token_warmup_step makes captions depend on the step, so text encoder outputs cannot "
                "be cached; switch one of them off"
            )
    return tuple(lines)
