"""Train Stable Diffusion 1.x or 2.x itself on folders of images, as DreamBooth does."""

from library.options.scripts import TRAIN_DB
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(TRAIN_DB, kind="library.training.kinds.full:FullTraining", tracker_name="dreambooth")

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
