"""Train SDXL itself: the U-Net and, if asked for, its text encoders."""

from library.options.scripts import SDXL_TRAIN
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(SDXL_TRAIN, kind="library.training.kinds.full:FullTraining", tracker_name="finetuning")

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
