"""The score of a model: gen_img draws what the questions about scenes ask for, plain image analysis reads the pictures.

Shapes: H W pixels, pictures uint8 (H, W, 3) RGB.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from library.checkpoint.io import atomic_write_json, atomic_write_text
from library.generation.app import run
from library.log import UserError
from library.options.scenes import ScoreOptions
from library.options.scripts import GEN_IMG
from library.rng import stream
from library.scenes.drawing import Picture
from library.scenes.scoring import Question, Share, questions, shares, shows, subject_questions

SIDE_PX = "64"
USUAL_SCALE = 5.0
SUBJECT, WORDLESS, OTHERS = "subject", "wordless", "others"
TITLES = {SUBJECT: "with the subject's word", WORDLESS: "the same without it", OTHERS: "of known shapes"}


def print_scores(options: ScoreOptions) -> int:
    """Print (and write, if asked) the share of right answers for each guidance scale; returns the exit status."""
    figures: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    for scale in options.scales or [USUAL_SCALE]:
        found = score(options, scale)
        for kind, answers in found.items():
            print(f"guidance scale {scale:g}, {options.count} prompts {TITLES[kind]} (95 % interval)")
            for name, share in answers.items():
                print(f"  {name:<8}{share}")
        figures[f"{scale:g}"] = {
            kind: {name: (share.value, *share.interval) for name, share in answers.items()}
            for kind, answers in found.items()
        }
    if options.out_json:
        atomic_write_json(Path(options.out_json).expanduser(), figures)
    return 0


def score(options: ScoreOptions, scale: float) -> dict[str, dict[str, Share]]:
    """For each kind of prompts the share of right answers for each property, at one guidance scale. Raises UserError.

    With a subject the prompts without its word have another "answer": how many pictures show the subject all the same.
    """
    asked = _questions(options)
    everything = [question for group in asked.values() for question in group]
    if options.outdir:
        pictures = iter(_draw(options, everything, scale, Path(options.outdir).expanduser() / f"{scale:g}"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            pictures = iter(_draw(options, everything, scale, Path(folder)))
    found: dict[str, dict[str, Share]] = {}
    for kind, group in asked.items():
        shown = [next(pictures) for _ in group]
        if kind != WORDLESS:
            found[kind] = shares(question.answer(picture) for question, picture in zip(group, shown, strict=True))
        if options.subject and kind != SUBJECT:
            strange = sum(shows(picture, options.subject) for picture in shown)
            found.setdefault(kind, {})[options.subject] = Share(strange, len(shown))
    return found


def _questions(options: ScoreOptions) -> dict[str, list[Question]]:
    others = {OTHERS: questions(options.count, stream(options.seed, "questions"))}
    if not options.subject:
        return others
    named, wordless = (
        subject_questions(options.subject, word, options.count, stream(options.seed, "subject questions"))
        for word in (options.subject_word, "")
    )
    return {SUBJECT: named, WORDLESS: wordless, **others}


def _draw(options: ScoreOptions, asked: list[Question], scale: float, folder: Path) -> list[Picture]:
    """The pictures of all questions, drawn by gen_img into ``folder``. Raises UserError if one is missing."""
    if any(folder.glob("*.png")):
        raise UserError(f"--outdir {folder}: there are pictures in it already; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{question.prompt} --d {options.seed + index}\n" for index, question in enumerate(asked))
    atomic_write_text(folder / "prompts.txt", lines)
    argv = ["--ckpt", str(options.ckpt), "--from_file", str(folder / "prompts.txt"), "--outdir", str(folder)]
    argv += ["--sequential_file_name", "--W", SIDE_PX, "--H", SIDE_PX, "--steps", str(options.steps)]
    argv += ["--scale", str(scale), "--sampler", options.sampler, "--batch_size", str(options.batch_size)]
    argv += ["--console_log_level", "WARNING"]
    if options.network_weights:
        argv += ["--network_module", options.network_module, "--network_weights", options.network_weights]
    if options.textual_inversion_embeddings:
        argv += ["--textual_inversion_embeddings", options.textual_inversion_embeddings]
    status = run(GEN_IMG, argv)
    files = sorted(folder.glob("*.png"))
    if status or len(files) != len(asked):
        raise UserError(f"{len(files)} of {len(asked)} pictures were drawn: see the messages above")
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]
