"""A network module like ``networks.lora`` whose second process gets Ctrl-C, alone, in its second step."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

from networks import lora


def create_network(*arguments: Any, **more: Any) -> Any:
    """The network of ``networks.lora`` with the signal in it."""
    network = lora.create_network(*arguments, **more)
    steps = itertools.count(1)

    def on_step_start(text_encoder: Any, unet: Any) -> None:
        if next(steps) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)

    network.on_step_start = on_step_start  # type: ignore[assignment]
    return network
