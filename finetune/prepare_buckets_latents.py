"""The old place of tools/prepare_buckets_latents.py: runs it with the same command line."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / Path(__file__).name), run_name="__main__")
