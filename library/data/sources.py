"""From data set specifications to records: every image found, measured, captioned and fitted to its bucket."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.data import caption_files
from library.data.buckets import bucket_sizes, fit, fit_to
from library.data.bulk import many_objects
from library.data.cache_files import ALPHA_MASK, BrokenArchive, read_facts, read_original_size
from library.data.formats import IMAGE_EXTENSIONS
from library.data.index import CAPTION_EXTENSIONS, FolderContent, read_folder
from library.data.metadata_json import Entry, FileFinder, FoundFiles, read_metadata
from library.data.pairs import CONDITIONING, MASK, pair
from library.data.records import (
    DatasetKind,
    DatasetSpec,
    Fit,
    ImageProblem,
    ImageRecord,
    OnBad,
    ResolvedDataset,
    Size,
    SubsetSpec,
)
from library.log import UserError, some_of

logger = logging.getLogger(__name__)

_NEVER_TRANSPARENT = (".jpg", ".jpeg", ".bmp")


def resolve(
    specs: Sequence[DatasetSpec],
    on_bad_image: OnBad = "error",
    on_bad_caption: OnBad = "error",
    allow_captionless: bool = False,
) -> tuple[ResolvedDataset, ...]:
    """Find the images of all data sets.

    Unusable images and captions are refused ("error") or left out ("skip"), in both cases listed by name. Raises
    UserError with every problem of every data set, one a line: folders that are missing or empty, no captions
    anywhere, unusable files.
    """
    search = _Search(on_bad_image, on_bad_caption, allow_captionless)
    with many_objects():
        datasets = tuple(search.dataset(index, spec) for index, spec in enumerate(specs))
    if search.errors:
        raise UserError.of([*search.errors, *search.ways_out])
    return datasets


@dataclass
class _Found:
    """What one subset yields."""

    records: list[ImageRecord] = field(default_factory=list)
    problems: list[ImageProblem] = field(default_factory=list)
    captionless: list[str] = field(default_factory=list)
    cut_captions: list[str] = field(default_factory=list)


@dataclass
class _Search:
    """The work of `resolve`: collects errors instead of stopping at the first."""

    on_bad_image: OnBad
    on_bad_caption: OnBad
    allow_captionless: bool
    errors: list[str] = field(default_factory=list)
    lacking: int = 0  # images without their mask or conditioning picture, among the errors
    _contents: dict[tuple[str, tuple[str, ...]], FolderContent | OSError] = field(default_factory=dict)

    def dataset(self, index: int, spec: DatasetSpec) -> ResolvedDataset:
        records: list[ImageRecord] = []
        problems: list[ImageProblem] = []
        for number, subset in enumerate(spec.subsets):
            if spec.kind is DatasetKind.FINETUNE:
                found = self._finetune_subset(subset, f"{index}.{number}", number)
            else:
                found = self._folder_subset(subset, f"{index}.{number}", number)
            if subset.conditioning_data_dir is not None:
                self._pair(subset, subset.conditioning_data_dir, found, CONDITIONING)
            if subset.mask_dir is not None:
                self._pair(subset, subset.mask_dir, found, MASK)
            if subset.uses_alpha:
                self._check_alpha(subset, found)
            if not subset.is_reg:
                caption_files.warn_about_missing(subset, found.captionless, len(found.records))
            caption_files.warn_about_cut(subset, found.cut_captions)
            caption_files.warn_about_braces(subset, found.records)
            records += found.records
            problems += found.problems
        records, lost = _usable_latents(spec, records)
        resolved = ResolvedDataset(spec, tuple(records), self._fits(spec, records), tuple(problems))
        if not resolved.has_training_images and not self.errors:
            self.errors.append(f"data set {index + 1} has no training images; add some, or remove the data set")
        self.errors += lost
        return resolved

    def _folder_subset(self, subset: SubsetSpec, key: str, number: int) -> _Found:
        found = _Found()
        extensions = CAPTION_EXTENSIONS if subset.caption_extension is None else (subset.caption_extension,)
        content = self._content(subset.name, extensions)
        if isinstance(content, OSError):
            self.errors.append(f"{subset.name}: the folder cannot be read ({content.strerror or content})")
            return found
        if not content.images and not content.bad_images:
            self.errors.append(f"{subset.name}: there are no images in the folder{_what_else_is_there(content.folder)}")
            return found
        self._bad(found, content.bad_images.values(), self.on_bad_image)
        place = content.path("")
        for name, size in content.images.items():
            caption_name = caption_files.name_for(name, content, extensions)
            if caption_name is not None and caption_name in content.bad_captions:
                self._bad(found, [content.bad_captions[caption_name]], self.on_bad_caption)
                continue
            caption = content.captions[caption_name] if caption_name is not None else None
            if caption is None:
                found.captionless.append(name)
            elif caption.has_more_lines:
                found.cut_captions.append(name)
            found.records.append(
                ImageRecord(
                    key=f"{key}/{name}",
                    path=place + name,
                    size=size,
                    caption=caption.text if caption is not None else subset.class_tokens or "",
                    repeats=subset.num_repeats,
                    is_reg=subset.is_reg,
                    subset=number,
                    has_caption=caption is not None,
                    caption_path=place + caption_name if caption_name is not None else None,
                )
            )
        if not self.allow_captionless and found.records and len(found.captionless) == len(found.records):
            self.errors += caption_files.problems_without(subset, content, extensions)
        if found.captionless:
            self.errors += caption_files.problems_of_name(subset)
        _warn_about_equal_stems(content)
        return found

    def _pair(self, subset: SubsetSpec, folder: str, found: _Found, what: str) -> None:
        """Give each image its conditioning picture or its mask; those that have none are unusable images."""
        places: dict[str, list[ImageRecord]] = {}
        for record in found.records:
            places.setdefault(_subfolder(record, subset), []).append(record)
        kept: dict[str, ImageRecord] = {}
        for place, records in places.items():
            own = os.path.join(folder, place) if place else folder
            content = self._content(own, ())
            if isinstance(content, OSError):
                self.errors.append(f"{own}: the folder cannot be read ({content.strerror or content})")
                return
            if os.path.realpath(content.folder) == os.path.realpath(os.path.dirname(records[0].path)):
                self.errors.append(
                    f"{folder}: the folder of {what}s (conditioning_data_dir) is that of the images; name another one"
                )
                return
            paths = self._pair_folder(subset, content, found, what, records)
            for record in records:
                if record.key in paths:
                    path = paths[record.key]
                    kept[record.key] = (
                        replace(record, mask_path=path) if what == MASK else replace(record, conditioning_path=path)
                    )
        found.records = [kept[record.key] for record in found.records if record.key in kept]

    def _pair_folder(
        self, subset: SubsetSpec, content: FolderContent, found: _Found, what: str, records: Sequence[ImageRecord]
    ) -> dict[str, str]:
        """The picture of each image of one folder, by the image's key."""
        pairing = pair({os.path.basename(record.path): record.size for record in records}, content, what)
        counts = Counter(os.path.basename(path) for path in {record.path for record in records})
        shared = f"images of several folders have its name, so none has a {what} of its own; set image_dir"
        problems = {**pairing.problems, **{name: shared for name, count in counts.items() if count > 1}}
        paths: dict[str, str] = {}
        for record in records:
            name = os.path.basename(record.path)
            if name in problems:
                self._bad(found, [ImageProblem(record.path, problems[name], lacks_pair=True)], self.on_bad_image)
            else:
                paths[record.key] = pairing.paths[name]
        for told, names in (
            ("belong to no image", pairing.unused),
            ("are stretched to their images", pairing.stretched),
        ):
            if names:
                place = content.folder
                logger.warning("%s: %d pictures of %s %s: %s", subset.name, len(names), place, told, some_of(names))
        return paths

    def _check_alpha(self, subset: SubsetSpec, found: _Found) -> None:
        """Latents without an image must hold a mask; a subset whose images cannot be transparent is worth a warning."""
        alone = [record for record in found.records if record.path == record.npz_path]
        bad = {record.key for record in alone if not _holds_mask(record.path)}
        reason = f"alpha_mask: there is no image beside these latents, and no {ALPHA_MASK} in them"
        problems = [ImageProblem(record.path, reason) for record in alone if record.key in bad]
        self._bad(found, problems, self.on_bad_image)
        found.records = [record for record in found.records if record.key not in bad]
        if found.records and all(record.path.lower().endswith(_NEVER_TRANSPARENT) for record in found.records):
            logger.warning("%s: alpha_mask masks nothing: no file of its format has transparency", subset.name)

    def _finetune_subset(self, subset: SubsetSpec, key: str, number: int) -> _Found:
        found = _Found()
        try:
            entries = read_metadata(os.path.expanduser(subset.name))
        except UserError as error:
            self.errors.append(str(error))
            return found
        image_dir = os.path.expanduser(subset.image_dir) if subset.image_dir is not None else None
        if image_dir is not None and not os.path.isdir(image_dir):
            self.errors.append(f"{subset.image_dir}: there is no such folder (image_dir of {subset.name})")
            return found
        finder = FileFinder(image_dir, self._content_or_none)
        for entry in entries:
            files = finder.find(entry.key)
            problem = _problem_of(entry, files, subset)
            if problem is not None:
                self._bad(found, [problem], self.on_bad_image)
                continue
            if not entry.caption:
                found.captionless.append(entry.key)
            found.records.append(_finetune_record(entry, files, subset, f"{key}/{entry.key}", number))
        return found

    def _fits(self, spec: DatasetSpec, records: Sequence[ImageRecord]) -> tuple[Fit, ...]:
        if records and all(record.train_resolution is not None for record in records):
            if spec.buckets is not None and spec.buckets.enable_bucket and spec.buckets.bucket_no_upscale:
                self.errors.append(
                    f"{spec.subsets[0].name}: it has its own training sizes; switch bucket_no_upscale off"
                )
            prepared = functools.cache(fit_to)
            return tuple(
                prepared(record.size, record.train_resolution) for record in records if record.train_resolution
            )
        rules = spec.buckets
        if rules is None:
            if records:
                self.errors.append(f"{spec.subsets[0].name}: not every image has a train_resolution; set resolution")
            return ()
        sizes = bucket_sizes(rules)

        @functools.cache
        def fit_size(size: Size) -> Fit:
            return fit(size, rules, sizes)

        return tuple(fit_size(record.size) for record in records)

    @property
    def ways_out(self) -> list[str]:
        """How to go on without the images that lack their mask or conditioning picture."""
        return ["--on_bad_image skip leaves out images that lack their picture"] if self.lacking else []

    def _bad(self, found: _Found, problems: Iterable[ImageProblem], on_bad: OnBad) -> None:
        for problem in problems:
            found.problems.append(problem)
            if on_bad == "error":
                self.errors.append(f"{problem.path}: {problem.reason}")
                self.lacking += problem.lacks_pair
            else:
                logger.warning("%s: left out: %s", problem.path, problem.reason)

    def _content(self, folder: str, extensions: tuple[str, ...]) -> FolderContent | OSError:
        folder = os.path.expanduser(folder)
        place = (folder, extensions)
        if place not in self._contents:
            try:
                self._contents[place] = read_folder(folder, extensions)
            except OSError as error:
                self._contents[place] = error
        return self._contents[place]

    def _content_or_none(self, folder: str) -> FolderContent | None:
        content = self._content(folder, ())
        return None if isinstance(content, OSError) else content


def _problem_of(entry: Entry, files: FoundFiles, subset: SubsetSpec) -> ImageProblem | None:
    if files.content is not None and files.image_name is not None:
        return files.content.bad_images.get(files.image_name)
    if files.npz_path is not None and entry.train_resolution is not None:
        return None
    where = subset.image_dir if subset.image_dir is not None else "this place (image_dir is not set)"
    return ImageProblem(entry.key, f"named in {subset.name}, but there is no such image in {where}")


def _finetune_record(entry: Entry, files: FoundFiles, subset: SubsetSpec, key: str, number: int) -> ImageRecord:
    if files.content is not None and files.image_name is not None:
        path, size = files.content.path(files.image_name), files.content.images[files.image_name]
    else:
        path, size = files.npz_path, entry.train_resolution
        assert path is not None  # _problem_of has refused entries without files
        size = read_original_size(Path(path)) or size
    assert size is not None
    return ImageRecord(
        key=key,
        path=path,
        size=size,
        caption=entry.caption,
        repeats=subset.num_repeats,
        is_reg=False,
        subset=number,
        has_caption=bool(entry.caption),
        train_resolution=entry.train_resolution,
        npz_path=files.npz_path,
        caption_path=os.path.expanduser(subset.name),
    )


def _usable_latents(spec: DatasetSpec, records: list[ImageRecord]) -> tuple[list[ImageRecord], list[str]]:
    """Latents prepared ahead are used for all images of a data set or for none, so that no batch mixes the two.

    Also gives one line for each image that has nothing but such latents although they cannot be used.
    """
    if not any(record.npz_path for record in records):
        return records, []
    needs_pixels = any(subset.augmentation.color_aug or subset.augmentation.random_crop for subset in spec.subsets)
    if not needs_pixels and all(record.npz_path and record.train_resolution for record in records):
        return records, []
    reason = "color_aug or random_crop is on" if needs_pixels else "not every image has them with a train_resolution"
    logger.warning("%s: the latents prepared ahead are not used, because %s", spec.subsets[0].name, reason)
    lost = [
        f"{record.path}: there is no image beside these latents" for record in records if record.path == record.npz_path
    ]
    return [replace(record, npz_path=None) for record in records], lost


def _subfolder(record: ImageRecord, subset: SubsetSpec) -> str:
    """Where below the folder of images an image of a metadata file lies; "" for any other."""
    if subset.metadata_file is None or subset.image_dir is None:
        return ""
    place = os.path.relpath(os.path.dirname(record.path), os.path.expanduser(subset.image_dir))
    return "" if place == os.curdir or place.startswith(os.pardir) else place


def _holds_mask(archive: str) -> bool:
    try:
        facts = read_facts(Path(archive))
    except BrokenArchive:
        return False
    return facts is not None and ALPHA_MASK in facts.names


def _warn_about_equal_stems(content: FolderContent) -> None:
    counts = Counter(name.rpartition(".")[0] for name in content.images)
    equal = [stem for stem, count in counts.items() if count > 1]
    if equal:
        logger.warning(
            "%s: images that differ only in their extension share a caption: %s", content.folder, some_of(equal)
        )


def _what_else_is_there(folder: str) -> str:
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in visible if os.path.isdir(entry.path))
    if folders:
        return f" (its subfolders are not searched: {some_of(folders)})"
    endings = sorted({os.path.splitext(entry.name)[1].lower() for entry in visible} - {""})
    read = " ".join(IMAGE_EXTENSIONS)
    return f" (it has {some_of(endings)} files; images are {read})" if endings else ""
