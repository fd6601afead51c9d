"""Where a scene is faint its start comes from larger blocks, and not from peaks of the noise."""

from __future__ import annotations

import torch

from diffinv.core.rng import Rng
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.spectral.base import Grid, Parameter
from diffinv.spectral.combine import UserModel
from diffinv.spectral.lines import GaussianLines
from diffinv.unmixing.mixture import Component, Mixture, SpectralData
from diffinv.unmixing.pipeline import pooled_parameters, strength
from diffinv.unmixing.pixels import PixelPlan, fit_pixels

SHAPE, PLAN = (8, 16), PixelPlan(starts=(0.2, 0.4, 0.6, 0.8))


def scene() -> tuple[Mixture, SpectralData]:
    """A line at u = 0.6 on a continuum, bright in the left half and lost in the noise in the right one."""
    grid = Grid.of([5000.0 + 1.5 * k for k in range(41)], "Angstrom")
    boxes = (Parameter("velocity", "km/s", -1500, 1500), Parameter("width", "km/s", 90, 110))
    line = GaussianLines(grid, torch.tensor([5030.0]).double(), torch.ones(1).double(), *boxes)
    flat = UserModel(grid, (), lambda theta: theta.new_ones(len(theta), len(grid)))
    mixture = Mixture((Component("line", line), Component("flat", flat)))
    bright = (torch.arange(SHAPE[1]) < 8).double().repeat(SHAPE[0])[:, None]
    amplitude = torch.cat([3 + 150 * bright, 0.2 + 10 * bright], 1)
    mean = mixture.mean(amplitude, torch.tensor([[0.6, 0.5]]).double().expand(len(bright), 2), torch.zeros(1, 40).double())
    noise = Rng.for_draws(0, [0], 1).normal(mean[None])[0]
    return mixture, SpectralData(mean + noise, Gaussian(torch.ones_like(mean)), torch.zeros(1, 40).double())


def test_strength_of_counts_is_their_number_and_of_noise_is_one() -> None:
    counts = torch.tensor([[3.0, 0.0, 5.0], [0.0, 0.0, 0.0]]).double()
    one = torch.ones(1).double()
    found = strength(SpectralData(counts, Poisson(one, 0 * one, None, floor=1e-9), torch.zeros(1, 3).double()))
    torch.testing.assert_close(found, torch.tensor([8.0, 0.0]).double(), rtol=0, atol=1e-6)
    noise = Rng.for_draws(1, [0], 1).normal(torch.empty(1, 4000, 30, dtype=torch.float64))[0]
    found = strength(SpectralData(noise, Gaussian(torch.ones_like(noise)), torch.zeros(1, 30).double()))
    assert abs(float(found.mean()) - 1) < 4 * (2 / 4000) ** 0.5  # χ² with one degree of freedom


def test_faint_pixels_start_from_blocks_that_see_the_line() -> None:
    mixture, data = scene()
    u = pooled_parameters(mixture, data, SHAPE, 1, PLAN)[:, 0].reshape(SHAPE)
    alone = fit_pixels(mixture, data, PLAN).u[:, 0].reshape(SHAPE)
    torch.testing.assert_close(u[:, :8], alone[:, :8])  # the bright ones by themselves
    assert float((u[:, :8] - 0.6).abs().max()) < 0.02
    rms = lambda found: float((found[:, 8:] - 0.6).pow(2).mean().sqrt())
    assert rms(u) < 0.05 and rms(alone) > 0.1
