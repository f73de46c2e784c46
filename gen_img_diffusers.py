"""The old name of gen_img.py for SD 1.x and 2.x: the same program, with the same command line."""

from library.generation.app import run
from library.options.scripts import GEN_IMG

if __name__ == "__main__":
    raise SystemExit(run(GEN_IMG))
