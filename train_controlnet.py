"""Train a ControlNet on Stable Diffusion 1.x, 2.x or SDXL."""

from library.options.scripts import TRAIN_CONTROLNET
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(
    TRAIN_CONTROLNET, kind="library.training.kinds.control:ControlNetTraining", tracker_name="controlnet_train"
)

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
