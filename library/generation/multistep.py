"""Linear multistep sampling (Adams-Bashforth in sigma, order 4). diffusers' own class needs scipy for a cubic.

Based on its Euler scheduler, which has the same tables and scaling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

ORDER = 4


class LinearMultistepScheduler(EulerDiscreteScheduler):
    """x' = x + sum of coefficients times the last derivatives dx/dsigma; the first order is Euler's method."""

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, num_inference_steps: int, device: Any = None
    ) -> None:
        """Begin a new picture."""
        super().set_timesteps(num_inference_steps, device)
        self.derivatives: list[Tensor] = []

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The sample at the next sigma."""
        if self.step_index is None:  # pyright: ignore[reportUnnecessaryComparison]
            self._init_step_index(timestep)
        index = self.step_index
        sigma = self.sigmas[index].item()
        denoised = sample - sigma * model_output
        if self.config["prediction_type"] == "v_prediction":
            denoised = sample / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5
        self.derivatives = [(sample - denoised) / sigma, *self.derivatives[: ORDER - 1]]
        sigmas = self.sigmas.double().numpy()
        coefficients = multistep_coefficients(sigmas, index, len(self.derivatives))
        self._step_index = index + 1
        return (sample + sum(c * d for c, d in zip(coefficients, self.derivatives, strict=True)),)


def multistep_coefficients(sigmas: np.ndarray, index: int, order: int) -> list[float]:
    """Integrals from sigma[index] to sigma[index + 1] of the Lagrange polynomials through the last ``order`` sigmas."""
    nodes = sigmas[index - np.arange(order)]
    points, weights = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    half, middle = (sigmas[index + 1] - sigmas[index]) / 2, (sigmas[index + 1] + sigmas[index]) / 2
    at = middle + half * points
    coefficients: list[float] = []
    for j in range(order):
        others = np.delete(nodes, j)
        basis = np.prod((at[:, None] - others) / (nodes[j] - others), axis=1)
        coefficients.append(float(half * (weights * basis).sum()))
    return coefficients
