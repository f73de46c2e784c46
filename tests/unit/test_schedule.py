"""Check values of the noise schedule, and its zero-terminal variant."""

import pytest
import torch

from library.diffusion.schedule import at_timesteps, make_schedule


def test_check_values_of_the_plain_schedule() -> None:
    schedule = make_schedule()
    ac, snr = schedule.alphas_cumprod_T, schedule.snr_T
    assert len(schedule) == 1000
    assert [ac[t].item() for t in (0, 500, 999)] == pytest.approx([0.99914998, 0.27633247, 0.00466010], rel=2e-6)
    assert [snr[t].item() for t in (0, 250, 500, 999)] == pytest.approx(
        [1175.44055, 2.0655317, 0.38185, 0.00468191], rel=1e-6
    )


def test_zero_terminal_schedule_ends_in_pure_noise_and_its_snr_follows() -> None:
    schedule = make_schedule(zero_terminal_snr=True)
    ac, snr = schedule.alphas_cumprod_T, schedule.snr_T
    assert [ac[t].item() for t in (0, 500, 999)] == pytest.approx([0.99914998, 0.24101855, 0], rel=2e-6)
    assert snr[999] == 0
    assert snr[500].item() == pytest.approx(0.24101855 / (1 - 0.24101855), rel=1e-5)  # not the plain schedule's 0.38
    assert bool((ac.diff() < 0).all())
    torch.testing.assert_close(torch.cumprod(1 - schedule.betas_T, 0), ac)


def test_tables_equal_diffusers() -> None:
    from diffusers import DDPMScheduler

    for zero in (False, True):
        theirs = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero
        )
        torch.testing.assert_close(make_schedule(zero_terminal_snr=zero).alphas_cumprod_T, theirs.alphas_cumprod)


def test_moving_keeps_what_it_is() -> None:
    schedule = make_schedule("v_prediction", zero_terminal_snr=True).to("meta")
    assert schedule.prediction_type == "v_prediction"
    assert schedule.zero_terminal_snr
    assert schedule.snr_T.device.type == "meta"


def test_values_at_timesteps_broadcast_over_samples() -> None:
    table = torch.arange(1000.0)
    assert at_timesteps(table, torch.tensor([3, 5]), torch.zeros(2, 4, 8, 8)).shape == (2, 1, 1, 1)
