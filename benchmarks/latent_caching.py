"""The cost of caching latents around the VAE: our whole pass over pictures on disk against the bare encoding.

Ours reads, decodes, fits and encodes the pictures, draws from the posterior and stores the latents; the bare turn
encodes the same batches, which are ready in memory. Both have the same VAE with random weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Turn, timed
from benchmarks.measuring import alternate
from benchmarks.random_models import random_module
from library.data.cache import LatentStore
from library.data.images import read_image, to_model_range
from library.data.records import BucketRules, DatasetKind, DatasetSpec, ResolvedDataset, SubsetSpec
from library.data.sources import resolve
from library.models import build
from library.models.spec import VaeSpec
from library.training.caching import cache_latents
