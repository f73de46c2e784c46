"""Train Stable Diffusion 1.x or 2.x itself on captioned images: the U-Net and, if asked for, its text encoder."""

from library.options.scripts import FINE_TUNE
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(FINE_TUNE, kind="library.training.kinds.full:FullTraining", tracker_name="finetuning")

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
