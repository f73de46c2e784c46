"""The data set configuration: what the user wrote, in a file or on the command line, as checked `DatasetSpec` objects.

No image is looked for here (see `sources`). A value is the first that is given of: subset, data set, [general],
command line.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from library.data.formats import IMAGE_EXTENSIONS
from library.data.records import Augmentation, BucketRules, CaptionRules, DatasetKind, DatasetSpec, SubsetSpec
from library.data.spec_checks import Finding, check_document, check_sizes, kind_of
from library.data.spec_keys import CONDITIONING_KEY, KEYS, ONLY_CONTROL
from library.log import UserError
from library.options.data import DataOptions
from library.options.lines import describe_place, line_of
from library.options.toml_file import parse_toml, read_utf8

logger = logging.getLogger(__name__)

_KINDS = frozenset({DatasetKind.DREAMBOOTH, DatasetKind.FINETUNE})


def load_dataset_specs(
    options: DataOptions,
    kinds: frozenset[DatasetKind] = _KINDS,
    conditioning_data_dir: str | None = None,
    *,
    masks: bool = False,
) -> tuple[DatasetSpec, ...]:
    """The data sets that the options describe: by --dataset_config, by --in_json, or by the folders of
    --train_data_dir (for ControlNets that folder itself, with ``conditioning_data_dir`` beside it).

    ``kinds`` are those that the script can train on. ``masks``: what ``conditioning_data_dir`` and the key of that name
    lead to are masks, not pictures for ControlNets. Raises UserError with all problems, one a line, with file and
    line.
    """
    if options.dataset_config is not None:
        source = _read_file(Path(options.dataset_config))
    elif kinds == ONLY_CONTROL:
        pair = {"image_dir": options.train_data_dir, CONDITIONING_KEY: conditioning_data_dir}
        source = _Source("--train_data_dir", {"datasets": [{"subsets": [_without_none(pair)]}]})
    elif options.in_json:
        subset = {"metadata_file": options.in_json, "image_dir": options.train_data_dir}
        subset[CONDITIONING_KEY] = conditioning_data_dir
        source = _Source("--in_json", {"datasets": [{"subsets": [_without_none(subset)]}]})
    elif options.train_data_dir:
        source = _Source(
            "--train_data_dir", {"datasets": [{"subsets": _folder_subsets(options, conditioning_data_dir)}]}
        )
    else:
        raise UserError("no training images: give --dataset_config, --train_data_dir or --in_json")
    source.report(check_document(source.document, kinds, masks))
    specs = _build(source.document, options, kinds, masks)
    findings = [finding for index, spec in enumerate(specs) for finding in check_sizes(spec, ("datasets", index))]
    findings += [
        Finding(("datasets", index), f"{spec.kind.value} data sets are not for this script")
        for index, spec in enumerate(specs)
        if spec.kind not in kinds
    ]
    source.report(findings)
    return _used(specs)


@dataclass(frozen=True)
class _Source:
    """A document and where it came from, to say so in messages."""

    name: str
    document: Any
    text: str | None = None
    is_json: bool = False

    def report(self, findings: list[Finding]) -> None:
        """Log the warnings; raise one UserError with all the rest."""
        for finding in findings:
            if finding.is_warning:
                logger.warning("%s", self._line(finding))
        problems = [self._line(finding) for finding in findings if not finding.is_warning]
        if problems:
            raise UserError.of(problems)

    def _line(self, finding: Finding) -> str:
        if self.text is None:
            return f"{self.name}: {finding.message}"
        line = line_of(self.text, self.is_json, self.document, finding.where)
        place = f"{self.name} line {line}" if line else self.name
        return f"{place}: " + f"{describe_place(finding.where)} {finding.message}".lstrip()


def _read_file(path: Path) -> _Source:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"--dataset_config {path}: the name must end in .toml or .json")
    text = read_utf8(path, "dataset_config")
    try:
        document = json.loads(text) if suffix == ".json" else parse_toml(text)
    except ValueError as error:
        raise UserError(f"--dataset_config {path}: {error}") from error
    return _Source(str(path), document, text, suffix == ".json")


def _folder_subsets(options: DataOptions, mask_root: str | None) -> list[dict[str, Any]]:
    """The subsets that folder names like ``10_sks dog`` mean: 10 repeats, class tokens ``sks dog``."""
    problems: list[str] = []
    subsets: list[dict[str, Any]] = []
    for option, root, is_reg in (
        ("--train_data_dir", options.train_data_dir, False),
        ("--reg_data_dir", options.reg_data_dir, True),
    ):
        if not root:
            continue
        try:
            found, others = _numbered_folders(os.path.expanduser(root))
        except OSError as error:
            problems.append(f"{option} {root}: cannot be read ({error.strerror or error})")
            continue
        for name in others:
            logger.warning(
                "%s %s: the folder %r is passed over; a name like '10_%s' gives it repeats", option, root, name, name
            )
        if not found:
            problems.append(
                f"{option} {root}: it has no folder named like '10_name' (repeats and class tokens){_loose(root)}"
            )
        for name, repeats, class_tokens in found:
            subsets.append(
                {
                    "image_dir": os.path.join(root, name),
                    "num_repeats": max(repeats, 0),
                    "class_tokens": class_tokens,
                    "is_reg": is_reg,
                }
            )
    if problems:
        raise UserError.of(problems)
    if mask_root is not None:
        _name_masks([subset for subset in subsets if not subset["is_reg"]], mask_root)
    return subsets


def _name_masks(subsets: list[dict[str, Any]], root: str) -> None:
    """Give each subset the folder of its name in that of the masks; a single one may have that folder itself."""
    if not os.path.isdir(os.path.expanduser(root)):
        raise UserError(f"--conditioning_data_dir {root}: there is no such folder")
    places = {os.path.basename(subset["image_dir"]): subset for subset in subsets}
    found = [name for name in places if os.path.isdir(os.path.join(os.path.expanduser(root), name))]
    if not found and len(subsets) == 1:
        subsets[0][CONDITIONING_KEY] = root
        return
    if not found:
        raise UserError(
            f"--conditioning_data_dir {root}: put the masks of each folder of images into a folder of its name there;"
            f" there is none of {', '.join(places)}"
        )
    for name, subset in places.items():
        if name in found:
            subset[CONDITIONING_KEY] = os.path.join(root, name)
        else:
            logger.warning("%s: has no masks: there is no folder %r in %s", subset["image_dir"], name, root)


def _loose(root: str) -> str:
    """A hint if images lie where folders of images should."""
    count = sum(name.lower().endswith(IMAGE_EXTENSIONS) for name in os.listdir(os.path.expanduser(root)))
    return f"; move the {count} images that lie there into such a folder" if count else ""


def _numbered_folders(root: str) -> tuple[list[tuple[str, int, str]], list[str]]:
    """Name, repeats and class tokens of the folders with a number in front, sorted by name; and the names of the
    others.
    """
    found: list[tuple[str, int, str]] = []
    others: list[str] = []
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in visible if os.path.isdir(entry.path))  # a circle of links is no folder
    for name in names:
        number, _, class_tokens = name.partition("_")
        try:
            found.append((name, int(number), class_tokens))
        except ValueError:
            others.append(name)
    return found, others


def _build(
    document: Mapping[str, Any], options: DataOptions, kinds: frozenset[DatasetKind], masks: bool
) -> list[DatasetSpec]:
    general = document.get("general", {})
    specs: list[DatasetSpec] = []
    for dataset in document["datasets"]:
        kind = kind_of(dataset, kinds, masks)
        assert kind is not None  # check_document has refused mixed kinds
        take = _Chain((dataset, general), options, kind)
        rules = None
        if take("resolution") is not None:
            rules = BucketRules(**{field.name: take(field.name) for field in fields(BucketRules)})
        chains = [_Chain((subset, dataset, general), options, kind) for subset in dataset["subsets"]]
        specs.append(
            DatasetSpec(
                kind=kind,
                batch_size=take("batch_size"),
                buckets=rules,
                subsets=tuple(_build_subset(chain, masks) for chain in chains),
                network_multiplier=take("network_multiplier"),
                prior_loss_weight=options.prior_loss_weight,
            )
        )
    return specs


def _build_subset(take: _Chain, masks: bool) -> SubsetSpec:
    texts = {"keep_tokens_separator", "secondary_separator", "caption_prefix", "caption_suffix"}
    captions = {field.name: take(field.name) for field in fields(CaptionRules) if field.name in KEYS}
    captions.update({name: captions[name] or "" for name in texts})
    folder = take(CONDITIONING_KEY)
    return SubsetSpec(
        image_dir=take("image_dir"),
        metadata_file=take("metadata_file"),
        conditioning_data_dir=None if masks else folder,
        mask_dir=folder if masks else None,
        alpha_mask=take("alpha_mask"),
        num_repeats=take("num_repeats"),
        is_reg=take("is_reg"),
        class_tokens=take("class_tokens"),
        caption_extension=take("caption_extension"),
        captions=CaptionRules(**captions),
        augmentation=Augmentation(**{field.name: take(field.name) for field in fields(Augmentation)}),
    )


@dataclass(frozen=True)
class _Chain:
    """Finds a key's value: in the tables in turn, then in the options, then its default.

    What has no meaning for the kind of data set, and may stand in [general] for others, has its default.
    """

    tables: tuple[Mapping[str, Any], ...]
    options: DataOptions
    kind: DatasetKind

    def __call__(self, name: str) -> Any:
        key = KEYS[name]
        if self.kind not in key.kinds:
            return key.default
        for table in self.tables:
            if table.get(name) is not None:
                return key.read(table[name])
        return getattr(self.options, key.option) if key.option else key.default


def _used(specs: list[DatasetSpec]) -> tuple[DatasetSpec, ...]:
    """Leaves out subsets without repeats and folders named twice in a data set, and says so."""
    used: list[DatasetSpec] = []
    for spec in specs:
        subsets: dict[str, SubsetSpec] = {}
        for subset in spec.subsets:
            place = os.path.realpath(os.path.expanduser(subset.name))
            if subset.num_repeats == 0:
                logger.warning("%s: left out, because it has 0 repeats", subset.name)
            elif place in subsets:
                logger.warning("%s: left out, because it stands twice in the same data set", subset.name)
            else:
                subsets[place] = subset
        if subsets:
            used.append(replace(spec, subsets=tuple(subsets.values())))
    if not used:
        raise UserError("no training images: every subset has 0 repeats")
    return tuple(used)


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}
