"""Sets up a fresh machine and runs the main job on the small built-in model; ``--test`` sets up and runs every check.

Only the standard library, on Linux, Windows and macOS: python quickstart.py
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 10)
DEFAULT_TORCH = "torch==2.13.0"
CONFIG = Path("examples/quickstart.toml")
BUILT_IN = (CONFIG, Path("examples/tiny/tiny-sd1.safetensors"), Path("examples/fish"))
TORCH_HINT = (
    "No PyTorch in {venv} yet: installing {torch}, the default build for this system.\n"
    "  For another build (CUDA version, ROCm, CPU only) stop here, install it, and start again, for example:\n"
    "  {python} -m pip install torch --index-url https://download.pytorch.org/whl/cu128"
)


class SetupError(Exception):
    """Something that the user has to mend, in one line."""


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(command: list[str | Path], failure: str, extra_env: dict[str, str] | None = None) -> None:
    """Run a command in the project's folder; SetupError with ``failure`` if it ends badly."""
    env = {**os.environ, **(extra_env or {})}
    status = subprocess.run([str(part) for part in command], cwd=ROOT, env=env).returncode
    if status:
        raise SetupError(f"{failure} (exit status {status})")


def answers(python: Path, code: str) -> bool:
    """True if the interpreter exists and runs ``code`` without an error."""
    try:
        return subprocess.run([str(python), "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv(venv: Path) -> Path:
    """Make the virtual environment unless a working one is there; its interpreter."""
    python = python_of(venv)
    if answers(python, "import pip"):
        return python
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SetupError(f"{venv} holds something else than a virtual environment: give another folder with --venv")
    print(f"Making the virtual environment {venv}", flush=True)
    hint = "check that the folder is writable; on Debian and Ubuntu install python3-venv first"
    run([sys.executable, "-m", "venv", "--clear", venv], f"{venv} could not be made: {hint}")
    return python


def fingerprint(python: Path, files: list[Path]) -> str:
    """Changes when the interpreter or one of the requirement files changes."""
    digest = hashlib.sha256(f"{python} {sys.version}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def install(venv: Path, torch: str, with_dev: bool) -> Path:
    """Bring the virtual environment up to date; nothing happens if it is already. Its interpreter."""
    python = make_venv(venv)
    wanted = [ROOT / "requirements.txt", *([ROOT / "requirements-dev.txt"] if with_dev else [])]
    lock = ROOT / "requirements.lock"
    stamp = venv / ("quickstart-dev.stamp" if with_dev else "quickstart.stamp")
    mark = fingerprint(python, [*wanted, lock])
    if stamp.exists() and stamp.read_text() == mark:
        return python
    pip: list[str | Path] = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    hint = "read pip's message above; check the connection to the package index and the free disk space"
    if not answers(python, "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"):
        print(TORCH_HINT.format(venv=venv, torch=torch, python=python), flush=True)
        run([*pip, torch], f"{torch} could not be installed: {hint}")
    print(f"Installing {' and '.join(file.name for file in wanted)} at the tested versions", flush=True)
    listed = [part for file in wanted for part in ("-r", file)]
    run([*pip, *listed, "-c", lock], f"the requirements could not be installed: {hint}")
    if not answers(python, "import torch"):
        raise SetupError(f"PyTorch does not start in {venv}: run `{python} -c 'import torch'` to see why")
    part = stamp.with_suffix(".part")
    part.write_text(mark)
    os.replace(part, stamp)  # whole or not there, if this is killed
    return python


def threads(processors: int) -> int:
    """Threads for computing: half of the processors, as two often share one core, but both if there are two."""
    return max(processors // 2, min(processors, 2))


def train_and_draw(python: Path, output_dir: Path) -> None:
    """Train a LoRA on the built-in model and photos, with pictures before and after; print where everything is."""
    for needed in BUILT_IN:
        if not (ROOT / needed).exists():
            raise SetupError(f"{needed} is missing: get a complete copy of the project")
    started = time.time()
    launch: list[str | Path] = [python, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", str(threads(os.cpu_count() or 1))]
    command = [*launch, "train_network.py", "--config_file", CONFIG, "--output_dir", output_dir]
    print(f"Teaching the small built-in model the shape of the pictures in {BUILT_IN[2]}", flush=True)
    run(command, "the training stopped: read its message above")
    report(output_dir, started, command)


def report(output_dir: Path, started: float, command: list[str | Path]) -> None:
    """Print the files that this run made."""
    made = sorted(file for file in output_dir.rglob("*") if file.is_file() and file.stat().st_mtime >= started - 1)
    previews = [file for file in made if re.search(r"_e?[0-9]{6}_[0-9]{2}_", file.name)]
    before = [file for file in previews if "_e000000_" in file.name]
    sheets = [file for file in made if file.name.endswith("previews.png")]
    if not before or len(before) == len(previews) or not sheets:
        raise SetupError(f"the training left no pictures before and after in {output_dir / 'sample'}")
    print(f"\nDone in {time.time() - started:.0f} s. The same by hand:")
    print("  " + " ".join(str(part) for part in command))
    for title, files in (
        ("LoRA", [file for file in made if file.suffix == ".safetensors"]),
        ("Pictures before and after, side by side", sheets),
    ):
        print(f"{title}:")
        for file in files:
            print(f"  {file}")


def test(python: Path) -> None:
    """Run style, types and tests, all of them even if one fails; SetupError names what failed."""
    checks: list[tuple[str, list[str | Path]]] = [
        ("style (ruff check)", [python, "-m", "ruff", "check", "."]),
        ("format (ruff format)", [python, "-m", "ruff", "format", "--check", "."]),
        ("types (basedpyright)", [python, "-m", "basedpyright", "--pythonpath", python]),
        ("tests (pytest)", [python, "-m", "pytest", "-n", "2", "--dist", "worksteal", "--durations", "10"]),
    ]
    failed: list[str] = []
    for name, command in checks:
        print(f"== {name}", flush=True)
        try:
            # With two workers at once, more than one thread each makes everything several times slower.
            run(command, name, {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
        except SetupError as error:
            failed.append(str(error))
    if failed:
        raise SetupError("failed: " + "; ".join(failed))
    print("All checks passed.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Set up, train a LoRA on the built-in model, and show pictures.")
    parser.add_argument("--test", action="store_true", help="set up and run style checks, type checks and all tests")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="virtual environment to make or use")
    parser.add_argument("--torch", default=DEFAULT_TORCH, help="what pip installs if no PyTorch is there")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "quickstart", help="where files go")
    options = parser.parse_args(argv)
    try:
        if sys.version_info < OLDEST:
            raise SetupError(f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {sys.version.split()[0]}")
        python = install(options.venv.absolute(), options.torch, options.test)
        if options.test:
            test(python)
        else:
            train_and_draw(python, options.output_dir.absolute())
    except SetupError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
