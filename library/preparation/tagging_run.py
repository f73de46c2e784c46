"""Tag files for a folder of images: the model's files, the runs of the model, the files written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from library.data.images import UnreadableImage, read_image
from library.hub import download_files
from library.log import UserError, first_line
from library.options.preparation import TagOptions
from library.preparation.files import read_text, with_extension
from library.preparation.outcome import Outcome
from library.preparation.tagging import Session, TagChooser, Tagger, TagRules, joined, read_tag_names
from library.preparation.text_files import images_to_describe, write_texts

logger = logging.getLogger(__name__)
MODEL, TABLE = "model.onnx", "selected_tags.csv"
_TENSORFLOW = "saved_model.pb"
_PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider")


def tag_folder(options: TagOptions, open_session: Callable[[Path], Session] | None = None) -> Outcome:
    """Write a tag file beside each image. Raises UserError. ``open_session`` None: by onnxruntime."""
    images, outcome = images_to_describe(options)
    if not images:
        return outcome
    folder = model_folder(options)
    rules = _rules(options)
    chooser = TagChooser(read_tag_names(folder / TABLE), rules)
    tagger = Tagger.of((open_session or _open_session)(folder / MODEL))

    def load(path: Path) -> tuple[NDArray[np.float32], list[str]]:
        existing = _existing(with_extension(path, options.caption_extension), rules) if options.append_tags else []
        return tagger.prepare(read_image(str(path))), existing

    def describe(paths: Sequence[Path], loaded: Sequence[tuple[NDArray[np.float32], list[str]]]) -> list[str]:
        scores_BN = tagger.scores([picture for picture, _ in loaded])
        pairs = zip(loaded, scores_BN, strict=True)
        return [joined(existing, chooser.choose(scores_N), rules) for (_, existing), scores_N in pairs]

    write_texts(options, images, outcome, load, describe)
    if options.frequency_tags:
        for tag, count in chooser.counts.most_common():
            logger.info("%s: %d", tag, count)
    return outcome


def model_folder(options: TagOptions) -> Path:
    """The folder with the model's two files; what is missing is fetched from the hub. Raises UserError."""
    folder = Path(options.model_dir).expanduser()
    missing = [name for name in (MODEL, TABLE) if options.force_download or not _is_filled(folder / name)]
    if MODEL in missing and not options.force_download and (folder / _TENSORFLOW).exists():
        raise UserError(
            f"--model_dir {folder}: holds the TensorFlow form of the tagger, which is not used here; --force_download "
            f"fetches the ONNX form of {options.repo_id} into it, or give another --model_dir"
        )
    if missing:
        download_files(options.repo_id, missing, folder, "--repo_id")
    return folder


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _rules(options: TagOptions) -> TagRules:
    def limit(own: float | None) -> float:
        return options.thresh if own is None else own

    rules = TagRules(
        general_threshold=limit(options.general_threshold),
        character_threshold=limit(options.character_threshold),
        separator=options.caption_separator,
        remove_underscore=options.remove_underscore,
        use_rating_tags=options.use_rating_tags,
        character_tags_first=options.character_tags_first,
    )
    return replace(rules, undesired=frozenset(rules.split(options.undesired_tags)))


def _existing(path: Path, rules: TagRules) -> list[str]:
    if not path.exists():
        return []
    try:
        return rules.split(read_text(path))
    except ValueError as error:
        raise UnreadableImage(str(path), f"its tags would be lost: {error}") from error


def _open_session(path: Path) -> Session:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "the tagger needs the package onnxruntime: pip install onnxruntime (onnxruntime-gpu for CUDA)"
        ) from error
    available = onnxruntime.get_available_providers()
    providers = [name for name in _PROVIDERS if name in available]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # its errors are of its own kinds, one for each way in which a file may be wrong
        raise UserError(f"{path}: cannot be opened as an ONNX model ({first_line(error)})") from error
    logger.info("%s: runs on %s", path, session.get_providers()[0])
    return session
