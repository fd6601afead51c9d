"""Estimates of the noise level, against known noise."""

from __future__ import annotations

import pytest
import torch

from diffinv.core.checks import ShapeError
from diffinv.core.rng import Rng
from diffinv.noise.estimate import exposure_difference, wavelet_mad

RNG = lambda seed: Rng.for_draws(seed, range(2), 1)
SIGMA = torch.tensor([0.3, 2.0], dtype=torch.float64)


def noisy(seed: int, bright: bool = True) -> torch.Tensor:
    ramp = torch.linspace(0, 50, 64, dtype=torch.float64)
    smooth = ramp[:, None] + 2 * ramp[None]
    return bright * smooth + SIGMA[:, None, None, None] * RNG(seed).normal(torch.zeros(2, 3, 64, 64, dtype=torch.float64))


def test_the_wavelet_estimate_sees_noise_and_not_a_smooth_image() -> None:
    found = wavelet_mad(noisy(1))
    assert found.shape == (2, 3)
    assert float((found / SIGMA[:, None] - 1).abs().max()) < 5 * 1.17 / 1024**0.5  # the MAD's relative error is 1.17/√n


def test_cosmic_rays_and_masked_pixels_hardly_change_it() -> None:
    y = noisy(1)
    y[..., 10, ::16] = 1e5
    y[..., 20, :] = torch.nan
    assert float((wavelet_mad(y) / SIGMA[:, None] - 1).abs().max()) < 0.25


def test_two_exposures_give_the_noise_of_one_whatever_the_scene() -> None:
    star = torch.zeros(64, 64, dtype=torch.float64)
    star[::2, ::3] = 1e3
    found = exposure_difference(noisy(1) + star, noisy(2) + star)
    assert float((found / SIGMA - 1).abs().max()) < 5 * 1.17 / (3 * 4096) ** 0.5
    assert float(wavelet_mad(noisy(1) + star).min()) > 10


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="2 × 2"):
        wavelet_mad(torch.zeros(3, 1, 1, 8))
    with pytest.raises(ShapeError, match="align"):
        exposure_difference(torch.zeros(1, 3), torch.zeros(1, 4))
