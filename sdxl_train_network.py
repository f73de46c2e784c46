"""Train a LoRA or another additional network on SDXL."""

from library.options.scripts import SDXL_TRAIN_NETWORK
from library.training.app import run
from library.training.script import Script

SCRIPT = Script(SDXL_TRAIN_NETWORK, kind="library.training.kinds.adapter:AdapterTraining", tracker_name="network_train")

if __name__ == "__main__":
    raise SystemExit(run(SCRIPT))
