"""Train a ControlNet-LLLite on SDXL."""

from library.options.scripts import SDXL_TRAIN_LLLITE
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(
    SDXL_TRAIN_LLLITE, kind="library.training.kinds.control:LLLiteTraining", tracker_name="lllite_control_net_train"
)

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
