"""Score how well a model draws scenes of coloured shapes: gen_img draws, plain image analysis reads the pictures."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.command import run_command
from library.options.scenes import SCORE_TINY, ScoreOptions
from library.options.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; returns the exit status."""
    return run_command(SCORE_TINY, _work, argv)


def _work(settings: Settings) -> int:
    from library.checkpoint.io import atomic_path

    options = settings[ScoreOptions]
    figures: dict[str, dict[str, list[float]]] = {}
    for scale in options.scales or [5.0]:
        found = score(options, scale)
        print(f"guidance scale {scale:g}, {options.count} prompts (95 % interval)")
        for name, share in found.items():
            print(f"  {name:<8}{share}")
        figures[f"{scale:g}"] = {name: [share.value, *share.interval] for name, share in found.items()}
    if options.out_json:
        with atomic_path(Path(options.out_json)) as part:
            part.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


def score(options: ScoreOptions, scale: float):
    """Draw all prompts at one guidance scale; the share of right answers for each property."""
    from library.rng import stream
    from library.scenes.scoring import questions, shares, subject_questions

    rng = stream(options.seed, "questions")
    if options.subject:
        asked = subject_questions(options.subject, options.subject_word, options.count, rng)
    else:
        asked = questions(options.count, rng)
    if options.outdir:
        pictures = draw(options, [question.prompt for question in asked], scale, Path(options.outdir) / f"{scale:g}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            pictures = draw(options, [question.prompt for question in asked], scale, Path(folder))
    return shares(question.answer(picture) for question, picture in zip(asked, pictures, strict=True))


def draw(options: ScoreOptions, prompts: list[str], scale: float, folder: Path):
    """The pictures of all prompts, drawn by gen_img into ``folder``. Raises UserError if one is missing."""
    import numpy as np
    from PIL import Image

    from library.generation.app import run
    from library.log import UserError
    from library.options.scripts import GEN_IMG

    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "prompts.txt"
    lines.write_text("".join(f"{text} --d {options.seed + index}\n" for index, text in enumerate(prompts)), "utf-8")
    argv = ["--ckpt", str(options.ckpt), "--from_file", str(lines), "--outdir", str(folder), "--sequential_file_name"]
    argv += ["--W", "64", "--H", "64", "--steps", str(options.steps), "--scale", str(scale)]
    argv += ["--sampler", options.sampler, "--batch_size", str(options.batch_size), "--console_log_level", "WARNING"]
    if options.network_weights:
        argv += ["--network_module", options.network_module, "--network_weights", options.network_weights]
    if options.textual_inversion_embeddings:
        argv += ["--textual_inversion_embeddings", options.textual_inversion_embeddings]
    status = run(GEN_IMG, argv)
    files = sorted(folder.glob("*.png"))[-len(prompts) :]
    if status or len(files) != len(prompts):
        raise UserError(f"{len(files)} of {len(prompts)} pictures were drawn")
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


if __name__ == "__main__":
    sys.exit(main())
