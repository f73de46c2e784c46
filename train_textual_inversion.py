"""Teach Stable Diffusion 1.x or 2.x new words (textual inversion)."""

from library.options.scripts import TRAIN_TEXTUAL_INVERSION
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(
    TRAIN_TEXTUAL_INVERSION,
    kind="library.training.kinds.embedding:EmbeddingTraining",
    tracker_name="textual_inversion",
)

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
