# ruff: noqa: RUF009 - option() declares a field
"""Options of the tools around the built-in model: drawing its scenes, and scoring what a model draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option
from library.options.saving import ConsoleOptions
from library.options.settings import ScriptOptions

Subject = Literal["house", "arrow", "moon", "fish", "turquoise", "grey"]


@dataclass(frozen=True, kw_only=True)
class SceneOptions(OptionGroup):
    """Drawing scenes of coloured shapes, with captions."""

    title: ClassVar[str] = "Scenes"

    output_dir: str | None = option(None, help="folder for the pictures and their captions", metavar="DIR")
    count: int = option(1000, ge=1, help="number of pictures")
    seed: int = option(1, ge=0, help="seed of all random draws")
    size_px: int = option(64, ge=16, le=1024, help="side of the pictures in pixels")
    out_json: str | None = option(None, help="write one metadata file instead of caption files", metavar="FILE")
    subject: Subject | None = option(None, help="draw this shape or colour, which the built-in model does not know")
    subject_word: str = option("sks", help="word for the subject in the captions")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(OptionGroup):
    """Asking a model for scenes, and reading its pictures."""

    title: ClassVar[str] = "Score"

    ckpt: str | None = option(None, help="model to score", metavar="PATH")
    network_weights: str | None = option(None, help="network file to draw with", metavar="FILE")
    network_module: str = option("networks.lora", help="module of the network")
    textual_inversion_embeddings: str | None = option(None, help="embedding file to draw with", metavar="FILE")
    count: int = option(
        200, ge=1, help="number of prompts; with a subject as many again without its word, and of known shapes"
    )
    seed: int = option(1, ge=0, help="seed of prompts and pictures")
    scales: list[float] | None = option(None, ge=0, help="guidance scales, all prompts with each; default: 5")
    steps: int = option(16, ge=1, help="sampling steps")
    sampler: str = option("euler", help="sampler")
    batch_size: int = option(16, ge=1, help="pictures drawn at once")
    subject: Subject | None = option(None, help="ask for this new shape or colour")
    subject_word: str = option("sks", help="word that the subject was taught by")
    outdir: str | None = option(None, help="keep the pictures here", metavar="DIR")
    out_json: str | None = option(None, help="write the figures as JSON", metavar="FILE")


MAKE_SCENES = ScriptOptions(
    name="tools/make_scenes.py",
    groups=(SceneOptions, ConsoleOptions),
    required=("output_dir",),
    summary="Draw scenes of coloured shapes with captions: the data of the built-in model.",
)

SCORE_TINY = ScriptOptions(
    name="tools/score_tiny.py",
    groups=(ScoreOptions, ConsoleOptions),
    required=("ckpt",),
    summary="Score how well a model draws scenes: colours, shapes, places, by image analysis.",
)
