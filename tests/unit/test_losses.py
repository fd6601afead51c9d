"""Denoising score matching: its weight, its minimiser, and that it is never reduced over the batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.losses.base import CleanBatch
from diffinv.losses.denoising import DenoisingScoreMatching
from diffinv.priors.base import Denoiser
from diffinv.schedules import LogNormal, Schedule

SIGMA_DATA = 0.6


class Constant(Schedule):
    """One noise level."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def level(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.sigma)


class Shrinkage(Denoiser):
    """D = a x."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return expand(self.factor, x) * x


class Offset(Denoiser):
    """Misses the clean images by `offset` everywhere, and keeps σ."""

    def __init__(self, clean: Tensor, offset: float) -> None:
        super().__init__()
        self.clean, self.offset = clean, offset

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.sigma = sigma
        return self.clean + self.offset


@dataclass(frozen=True)
class Slope:
    """d loss/d a of D = a x over many rows: its mean and the standard error of it."""

    mean: float
    error: float


def slope(factor: float, sigma: float, variance: float, rows: int = 4000, pixels: int = 10) -> Slope:
    rng = Rng.for_draws(1, range(rows), 1)
    clean = variance**0.5 * rng.normal(torch.zeros(rows, 1, 1, pixels, dtype=torch.float64))
    parameter = torch.full((rows,), factor, dtype=torch.float64, requires_grad=True)
    loss = DenoisingScoreMatching(Constant(sigma), SIGMA_DATA)(Shrinkage(parameter), CleanBatch(clean), rng)
    (gradient,) = torch.autograd.grad(loss.sum(), parameter)
    return Slope(float(gradient.mean()), float(gradient.std() / rows**0.5))


@pytest.mark.parametrize("sigma", [0.2, 0.9, 4.0])
def test_the_minimiser_on_a_gaussian_is_the_wiener_shrinkage(sigma: float) -> None:
    variance = 0.5
    best = slope(variance / (variance + sigma**2), sigma, variance)
    assert abs(best.mean) <= 4.5 * best.error
    for wrong in (variance / (variance + sigma), 1.0):
        mutant = slope(wrong, sigma, variance)
        assert abs(mutant.mean) > 10 * mutant.error


def test_the_weight_is_that_of_edm() -> None:
    x = torch.zeros(6, 2, 3, 3, dtype=torch.float64)
    model = Offset(x, 0.25)
    loss = DenoisingScoreMatching(LogNormal(-0.7, 1.7), SIGMA_DATA)(model, CleanBatch(x), Rng.for_draws(0, range(6), 1))
    expected = (1 / model.sigma**2 + 1 / SIGMA_DATA**2) * 0.25**2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert len(set(model.sigma.tolist())) == 6


def test_a_row_alone_has_the_loss_that_it_has_in_a_batch() -> None:
    x = Rng.for_draws(5, range(4), 1).normal(torch.zeros(4, 1, 3, 3, dtype=torch.float64))
    loss = DenoisingScoreMatching(LogNormal(-0.7, 1.7), SIGMA_DATA)
    factor = torch.full((4,), 0.5, dtype=torch.float64)
    whole = loss(Shrinkage(factor), CleanBatch(x), Rng.for_draws(0, range(4), 1))
    assert whole.shape == (4,)
    assert len(set(whole.tolist())) == 4
    alone = loss(Shrinkage(factor[:1]), CleanBatch(x[2:3]), Rng.for_draws(0, [2], 1))
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-12, atol=0)


def test_the_loss_of_the_preconditioned_target_is_of_order_one_at_every_level() -> None:
    """w(σ) c_out² = 1: a network F = 0 has the loss Var[target] = 1 for images of the declared spread."""

    class Skip(Denoiser):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return expand(SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2), x) * x

    rows = 4000
    for sigma in (0.01, 0.6, 50.0):
        rng = Rng.for_draws(2, range(rows), 1)
        clean = SIGMA_DATA * rng.normal(torch.zeros(rows, 1, 1, 4, dtype=torch.float64))
        loss = DenoisingScoreMatching(Constant(sigma), SIGMA_DATA)(Skip(), CleanBatch(clean), rng)
        assert abs(float(loss.mean()) - 1) <= 4.5 * (2 / (4 * rows)) ** 0.5
