"""Losses of a denoiser that sees parts of images: the gradient of the risk with the truth as target; mutants that must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import expand
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.incomplete import MaskedAmbient, SpectralAmbient
from diffinv.noise.correlated import CorrelatedGaussian
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Diagonal, Identity
from diffinv.operators.base import LinearOperator
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.operators.fourier import MaskedFourier
from diffinv.operators.sampling import Mask
from diffinv.priors.base import Denoiser
from diffinv.reconstructors.spectra import coefficients
from tests.cases.losses import LEVELS, fill
from tests.cases.noise import SHAPE, ramp, spectrum, two

F64 = torch.float64
ROWS = 4000


class Curved(Denoiser):
    """D = a tanh(c x) + d x/(1 + σ) + e roll(x) + g mask: five parameters a row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([0.7, 0.8, 0.4, -0.3, 0.2], dtype=F64).expand(rows, 5).clone())

    def forward(self, x: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
        a, c, d, e, g = (expand(p, x) for p in self.theta.unbind(1))
        shown = torch.ones_like(x) if mask is None else mask.to(x)
        return a * torch.tanh(c * x) + d * x / expand(1 + sigma, x) + e * x.roll(1, -1) + g * shown


def good() -> Tensor:
    """(2, *SHAPE), some pixels unseen in each image."""
    return ramp(0, 1) > 0.25


def kernels() -> Tensor:
    kernel = torch.tensor([[0.0, 0.1, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.0]], dtype=F64)
    return torch.stack([kernel, kernel.mT.roll(1, 0)])[:, None]


def frequencies() -> Tensor:
    """(2, 3, 4): some measured with their mirror images, some without, some not at all."""
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 0] = mask[0, 1, :2] = mask[1, :, 0] = mask[1, 2, 1] = True
    return mask


def with_mask() -> Gaussian:
    return Gaussian(ramp(0.5, 2), good())


INSTRUMENTS: dict[str, Callable[[int], tuple[LinearOperator, object]]] = {
    "mask": lambda n: (Mask(good()).repeat(n), Gaussian(two(0.5, 1.5)).repeat(n)),
    "bad pixels": lambda n: (Identity(SHAPE), with_mask().repeat(n)),
    "weights": lambda n: (Diagonal(0.5 + ramp(0, 1) * good()).repeat(n), with_mask().repeat(n)),
    "blur": lambda n: (PeriodicConvolution(kernels(), 2, SHAPE[1:]).repeat(n), Gaussian(two(0.3, 0.6)).repeat(n)),
    "blur, correlated": lambda n: (
        PeriodicConvolution(kernels(), 2, SHAPE[1:]).repeat(n),
        CorrelatedGaussian(two(0.4, 0.6), spectrum()).repeat(n),
    ),
    "k-space": lambda n: (MaskedFourier(frequencies(), 2).repeat(n), Gaussian(two(0.4, 0.8)).repeat(n)),
}
PIXELS, FREQUENCIES = ("mask", "bad pixels", "weights"), ("blur", "blur, correlated", "k-space")


def measured(name: str, rows: int) -> MeasuredBatch:
    operator, noise = INSTRUMENTS[name](rows // 2)
    x = ramp(-1, 2).repeat_interleave(rows // 2, 0)
    return MeasuredBatch(Observation(noise.sample(operator(x), Rng.for_draws(1, range(rows), 1)), operator, noise), x)


def z_values(loss: Loss, batch: MeasuredBatch) -> Tensor:
    rows = batch.observation.y.shape[0]
    model, rng = Curved(rows), lambda: Rng.for_draws(11, range(rows), 1)
    slope = lambda values: torch.autograd.grad(values.sum(), model.theta, allow_unused=True)[0]
    difference = slope(loss(model, batch, rng())) - slope(loss.oracle(model, batch, rng()))
    error = difference.std(0) / rows**0.5
    return difference.mean(0) / torch.where(error > 1e-12 * difference.abs().amax(), error, torch.inf)


MASKED, SPECTRAL = MaskedAmbient(LEVELS, 1.0, 0.7), SpectralAmbient(LEVELS, 1.0, fill())
PAIRS = [(MASKED, name) for name in PIXELS] + [(SPECTRAL, name) for name in FREQUENCIES]


@pytest.mark.parametrize(("loss", "name"), PAIRS, ids=[name for _, name in PAIRS])
def test_the_expected_gradient_is_that_of_the_truth(loss: Loss, name: str) -> None:
    z = z_values(loss, measured(name, ROWS))
    assert float(z.abs().max()) <= 5, z


@pytest.mark.parametrize("name", FREQUENCIES)
def test_coefficients_are_those_of_the_image_with_the_variance_they_say(name: str) -> None:
    batch = measured(name, 20000)
    found, variance = coefficients("", batch.observation)
    torch.testing.assert_close(found, found.flip(-2, -1).roll((1, 1), (-2, -1)).conj())
    seen = variance.isfinite()
    assert bool((found[~seen] == 0).all())
    error = (found - torch.fft.fft2(batch.x, norm="ortho")).where(seen, 0.0)
    for part in (slice(0, 10000), slice(10000, 20000)):
        for values in (error[part].real, error[part].imag, (error[part].abs() ** 2 - variance[part]).where(seen[part], 0.0)):
            z = values.mean(0) / values.std(0).clamp_min(1e-12) * 100
            assert float(z.abs().max()) <= 5


def test_the_unseen_is_not_looked_at() -> None:
    batch = measured("mask", 4)
    spoilt = replace(batch.observation, y=batch.observation.y.where(good().repeat_interleave(2, 0), 1e6))
    rng = lambda: Rng.for_draws(0, range(4), 1)
    torch.testing.assert_close(MASKED(Curved(4), batch, rng()), MASKED(Curved(4), replace(batch, observation=spoilt), rng()))


def test_frequencies_count_alike_over_instruments() -> None:
    """Σ over rows of 1[used]/P is the number of rows, at every frequency that some row uses."""
    sigma = torch.tensor([0.6, 0.8, 2.0], dtype=F64)
    held = fill()
    used = (held.variances[None] < (sigma**2)[:, None, None, None, None]).double()
    total = (used / held.probability(sigma)[:, None]).mean(1)
    assert bool((((total - 1).abs() < 1e-12) | (total == 0)).all())


class ShownAgain(MaskedAmbient):
    """Pixels that are shown are met with their own noise."""

    def _risk(self, model, batch, rng, x):
        return super()._risk(model, batch, rng, batch.data.y if x is None else x)


class NoDivergence(SpectralAmbient):
    """GSURE without its divergence, as the released configurations of the paper nearly have it."""

    def __call__(self, model, batch, rng):
        sigma, x, datum, weight, _ = self._level(batch, rng)
        risk = weight * (torch.fft.fft2(model(x, sigma), norm="ortho") - datum).abs() ** 2
        return (sigma**2 + 1) / sigma**2 / 24 * risk.flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class DataVariance(SpectralAmbient):
    """σ_n² in place of σ_n²/|ĥ|² in the divergence."""

    def _level(self, batch, rng):
        sigma, x, datum, weight, variance = super()._level(batch, rng)
        noise = batch.observation.noise.variance(torch.zeros_like(x)).amax((1, 2, 3), keepdim=True)
        return sigma, x, datum, weight, noise.expand(variance.shape).where(variance > 0, 0.0)


MUTANTS: dict[str, tuple[Loss, str]] = {
    "shown pixels met again": (ShownAgain(LEVELS, 1.0, 0.7), "mask"),
    "no divergence": (NoDivergence(LEVELS, 1.0, fill()), "blur"),
    "no divergence, k-space": (NoDivergence(LEVELS, 1.0, fill()), "k-space"),
    "the data's variance": (DataVariance(LEVELS, 1.0, fill()), "blur"),
}


@pytest.mark.parametrize("flaw", MUTANTS)
def test_a_flawed_loss_is_caught(flaw: str) -> None:
    loss, name = MUTANTS[flaw]
    assert float(z_values(loss, measured(name, ROWS)).abs().max()) > 5


@pytest.mark.parametrize(("loss", "name"), PAIRS, ids=[name for _, name in PAIRS])
def test_a_row_alone_has_the_loss_that_it_has_in_a_batch(loss: Loss, name: str) -> None:
    batch = measured(name, 4)
    whole = loss(Curved(4), batch, Rng.for_draws(0, range(4), 1))
    assert len(set(whole.tolist())) == 4
    torch.testing.assert_close(loss(Curved(1), batch.select([2]), Rng.for_draws(0, [2], 1)), whole[2:3], rtol=1e-8, atol=1e-12)


def test_what_has_no_rule_is_refused() -> None:
    y = ramp(-1, 2)
    counts = MeasuredBatch(Observation(y + 2, Identity(SHAPE), Poisson(two(1, 1), two(1, 1))))
    for loss in (MASKED, SPECTRAL):
        with pytest.raises(UnsupportedError, match="Poisson"):
            loss.check(counts)
    with pytest.raises(UnsupportedError, match="mixes pixels"):
        MASKED.check(measured("blur", 2))
    with pytest.raises(UnsupportedError, match="not diagonal in the DFT"):
        SPECTRAL.check(measured("mask", 2))
    operator = MaskedFourier(frequencies(), 2)
    uneven = MeasuredBatch(Observation(operator(y), operator, Gaussian(torch.ones(1, 2, 3, 4, 2, dtype=F64))))
    with pytest.raises(UnsupportedError, match="one σ a row"):
        SPECTRAL.check(uneven)
    with pytest.raises(DiffinvError, match="kept is 1"):
        MaskedAmbient(LEVELS, 1.0, 1.0)
