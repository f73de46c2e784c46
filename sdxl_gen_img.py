"""Draw pictures with SDXL: gen_img.py with SDXL chosen."""

from library.generation.app import run
from library.options.scripts import SDXL_GEN_IMG

if __name__ == "__main__":
    raise SystemExit(run(SDXL_GEN_IMG))
