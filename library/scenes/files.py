"""Scenes as picture files with captions beside them, or in one metadata file."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from library.checkpoint.io import atomic_path, atomic_write_json, atomic_write_text
from library.log import progress
from library.options.scenes import SceneOptions
from library.rng import stream
from library.scenes.drawing import draw
from library.scenes.making import random_scene
from library.scenes.scoring import subject_caption, subject_scenes
from library.scenes.wording import caption
from library.scenes.world import Scene

logger = logging.getLogger(__name__)


def write_scenes(options: SceneOptions) -> int:
    """Draw and write all pictures and captions; returns the exit status."""
    folder = Path(str(options.output_dir)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    scenes = _subjects(options) if options.subject else _scenes(options)
    texts: dict[str, dict[str, str]] = {}
    for index, (scene, text) in enumerate(progress(scenes, "pictures")):
        name = f"{index:05d}"
        picture = Image.fromarray(draw(scene, stream(options.seed, "shades", index), options.size_px))
        with atomic_path(folder / f"{name}.png", durable=False) as part:  # the seed draws it again
            picture.save(part, format="PNG")
        texts[name] = {"caption": text}
        if not options.out_json:
            atomic_write_text(folder / f"{name}.txt", text + "\n", durable=False)
    if options.out_json:
        atomic_write_json(Path(options.out_json).expanduser(), texts, indent=1)
    logger.info("%s: %d pictures", folder, len(texts))
    return 0


def _scenes(options: SceneOptions) -> list[tuple[Scene, str]]:
    streams = [stream(options.seed, "scene", index) for index in range(options.count)]
    return [(scene, caption(scene, rng)) for rng in streams for scene in [random_scene(rng)]]


def _subjects(options: SceneOptions) -> list[tuple[Scene, str]]:
    rng = stream(options.seed, "subject")
    scenes = subject_scenes(str(options.subject), options.count, rng)
    return [(scene, subject_caption(scene, options.subject_word, rng)) for scene in scenes]
