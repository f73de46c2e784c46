"""Runs an entry script in several processes at once, as torchrun does, without paying for the imports in each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
# What every run imports, once for all of them.
PRELOADED = (
    "tests.training.processes",
    "library.training.session",
    "library.training.setup",
    "library.training.text_caching",
    "library.training.kinds.adapter",
    "library.training.kinds.full",
    "library.training.kinds.control",
    "library.training.kinds.embedding",
    "library.families.sd",
    "library.families.sdxl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet",
    "transformers.models.clip.modeling_clip",
    "torch.nn.parallel.distributed",
    "networks.lora",
    "networks.lllite",
)


def launch(script: str, arguments: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    """Run an entry script as ``__main__`` in that many processes on the CPU, which find each other as under torchrun.

    They are forked from a helper that has imported the libraries and done nothing else; so they are as separate as
    programs, but start at once. Where that does not exist, torchrun starts them. ``returncode`` is the worst.
    """
    if sys.platform != "linux":
        return launch_torchrun(script, arguments, processes)
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **_environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder)
        started = [
            context.Process(target=_be_rank, args=(script, arguments, _rank_of(shared, rank), outputs))
            for rank in range(processes)
        ]
        try:
            for process in started:
                process.start()
            for process in started:
                process.join(SECONDS)
            codes = [process.exitcode for process in started]
        finally:
            for process in started:
                process.kill()
                process.join()
        said = ["".join(file.read_text() for file in sorted(outputs.glob(f"*.{name}"))) for name in ("out", "err")]
    worst = next((code for code in codes if code != 0), 0)
    if worst is None:
        raise subprocess.TimeoutExpired([script, *arguments], SECONDS, said[0], said[1])
    return subprocess.CompletedProcess([script, *arguments], worst, said[0], said[1])


def launch_torchrun(script: str, arguments: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    """The same with the real torchrun, as users start it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*launcher, script, *arguments],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def _rank_of(shared: dict[str, str], rank: int) -> dict[str, str]:
    return {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def _be_rank(script: str, arguments: list[str], environment: dict[str, str], outputs: Path) -> None:
    """One of the processes: its output goes to files of ``outputs``, its status is the script's."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(outputs / f"{environment['RANK']}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")
