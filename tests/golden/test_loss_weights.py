"""Weightings per timestep are the reference's, on the unchanged schedule."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from library.diffusion.schedule import make_schedule
from library.diffusion.weighting import debiased, min_snr, scale_v_like_noise, v_like

DATA = json.loads(gzip.decompress((Path(__file__).with_name("data") / "loss_weights.json.gz").read_bytes()))
TIMESTEPS = torch.tensor(DATA["timesteps"])
SNR_B = make_schedule().snr_T[TIMESTEPS]


@pytest.mark.parametrize(
    ("name", "factors_B"),
    [
        ("all_snr", SNR_B),
        ("min_snr_5", min_snr(SNR_B, 5, "epsilon")),
        ("min_snr_5_v", min_snr(SNR_B, 5, "v_prediction")),
        ("scale_v_like_noise", scale_v_like_noise(SNR_B, 1, "v_prediction")),
        ("v_like_0.5", v_like(SNR_B, 0.5, "epsilon")),
        ("debiased", debiased(SNR_B, 1, "epsilon")),
    ],
)
def test_weights_equal_the_references(name: str, factors_B: torch.Tensor) -> None:
    torch.testing.assert_close(factors_B, torch.tensor(DATA[name]), rtol=5e-7, atol=0)


def test_zero_terminal_schedule_equals_the_references() -> None:
    table = make_schedule(zero_terminal_snr=True).alphas_cumprod_T[TIMESTEPS]
    torch.testing.assert_close(table, torch.tensor(DATA["zero_terminal_snr_alphas_cumprod"]), rtol=5e-6, atol=0)
