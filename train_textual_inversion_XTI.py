"""Teach Stable Diffusion 1.x or 2.x new words, with other vectors for each cross-attention layer."""

from library.options.scripts import TRAIN_TEXTUAL_INVERSION_XTI
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(
    TRAIN_TEXTUAL_INVERSION_XTI,
    kind="library.training.kinds.embedding:LayerEmbeddingTraining",
    tracker_name="textual_inversion",
)

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
