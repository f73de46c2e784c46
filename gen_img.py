"""Draw pictures with Stable Diffusion 1.x, 2.x or SDXL."""

from library.generation.app import run
from library.options.scripts import GEN_IMG

if __name__ == "__main__":
    raise SystemExit(run(GEN_IMG))
