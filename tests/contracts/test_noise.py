"""What every noise promises, and mutants that break each promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffinv.core.batched import collate
from diffinv.core.checks import UnsupportedError
from diffinv.core.linalg import dense
from diffinv.core.registry import from_dict, to_dict
from diffinv.core.rng import Rng
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.photon import HeteroscedasticGaussian
from diffinv.operators.algebra import Diagonal
from tests.cases import registered
from tests.cases.noise import CASES, VARIANTS, NoiseCase, ramp, two

ALL = {**CASES, **VARIANTS}
DRAWS = 5000
Z = 4.5


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> NoiseCase:
    return ALL[request.param]()


def rows(case: NoiseCase, draws: int) -> list[tuple[NoiseCase, Rng]]:
    """Every image of the case alone, `draws` times, with its streams."""
    size = case.mean.shape[0]
    many = [NoiseCase(case.noise.select([i]), case.mean[i : i + 1].expand(draws, -1, -1, -1), case.splits) for i in range(size)]
    return [(row, Rng.for_draws(11, [i], draws)) for i, row in enumerate(many)]


def data(case: NoiseCase) -> Tensor:
    return case.noise.sample(case.mean, Rng.for_draws(3, range(case.mean.shape[0]), 1))


def z_of_mean(samples: Tensor) -> float:
    """Largest |z| of the column means of (N, m) samples against zero; constant columns must be zero."""
    mean, error = samples.mean(0), samples.std(0) / math.sqrt(samples.shape[0])
    assert bool((mean[error == 0] == 0).all())
    return float((mean / error)[error > 0].abs().max())


def z_of_covariance(samples: Tensor, covariance: Tensor) -> float:
    """Largest |z| of the second moment of samples (N, n) along 16 random directions and along the axes."""
    n = samples.shape[1]
    generator = torch.Generator().manual_seed(5)
    directions = torch.cat([torch.eye(n, dtype=samples.dtype), torch.randn(16, n, generator=generator, dtype=samples.dtype)])
    expected = torch.einsum("mi,ij,mj->m", directions, covariance, directions)
    return z_of_mean((samples @ directions.mT) ** 2 - expected)


def check_score_is_gradient(case: NoiseCase) -> None:
    y = data(case)
    mean = case.mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case.noise.log_prob(y, mean).sum(), mean)
    score = case.noise.score(y, case.mean)
    assert float((gradient - score).abs().max()) <= 1e-8 * float(score.abs().max())


def check_score_moments(case: NoiseCase) -> None:
    for row, rng in rows(case, DRAWS):
        score = row.noise.score(row.noise.sample(row.mean, rng), row.mean).flatten(1)
        assert z_of_mean(score) <= Z
        assert z_of_covariance(score, dense(row.noise.precision(row.mean[:1]), row.mean[:1])) <= Z


def check_precision_is_symmetric(case: NoiseCase) -> None:
    for row, _ in rows(case, 1):
        matrix = dense(row.noise.precision(row.mean), row.mean)
        assert float((matrix - matrix.mT).abs().max()) <= 1e-9 * float(matrix.abs().max())
        assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-9 * float(matrix.abs().max())


def check_perturb(case: NoiseCase) -> None:
    for row, rng in rows(case, DRAWS):
        draws = row.noise.perturb(row.mean, rng).flatten(1)
        assert z_of_mean(draws) <= Z
        assert z_of_covariance(draws, dense(row.noise.precision(row.mean[:1]), row.mean[:1])) <= Z


def check_variance(case: NoiseCase) -> None:
    for row, rng in rows(case, DRAWS):
        y = row.noise.sample(row.mean, rng).flatten(1)
        variance = row.noise.variance(row.mean[:1]).flatten()
        good = variance.isfinite()
        assert z_of_mean(((y - y.mean(0)) ** 2 - variance)[:, good]) <= Z


def check_mask(case: NoiseCase) -> None:
    """Data under the mask change nothing, whatever they are, and the mean there neither."""
    good, y = case.noise.mask, data(case)
    spoilt = torch.where(good, y, torch.nan)
    mean = case.mean.clone().requires_grad_()
    log_prob = case.noise.log_prob(spoilt, mean)
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    score = case.noise.score(spoilt, case.mean)
    assert torch.equal(log_prob, case.noise.log_prob(torch.where(good, y, -y - 7), mean))
    assert bool(gradient.isfinite().all())
    assert torch.equal(score, case.noise.score(y, case.mean))
    for value in (gradient, score, case.noise.precision(case.mean)(torch.ones_like(case.mean))):
        assert bool((value[~good] == 0).all())
    assert bool(case.noise.variance(case.mean)[~good].isinf().all())
    moved = torch.where(good, case.mean, case.mean + 1)
    torch.testing.assert_close(case.noise.log_prob(spoilt, moved), log_prob, rtol=1e-12, atol=0)


def results(noise, y: Tensor, mean: Tensor, rng: Rng) -> list[Tensor]:
    precision = noise.precision(mean)(torch.cos(mean))
    return [
        noise.log_prob(y, mean),
        noise.score(y, mean),
        precision,
        noise.variance(mean),
        noise.sample(mean, rng),
        noise.perturb(mean, rng),
    ]


def check_rows_are_independent(case: NoiseCase) -> None:
    """A row alone, in a repeated batch and in a collated one gives what it gives in the batch."""
    y, rng = data(case), Rng.for_draws(4, [0, 1], 1)
    whole = results(case.noise, y, case.mean, rng.select(slice(None)))
    singles = [case.noise.select([i]) for i in (0, 1)]
    alone = [results(n, y[i : i + 1], case.mean[i : i + 1], rng.select(slice(i, i + 1))) for i, n in enumerate(singles)]
    collated = results(collate(singles), y, case.mean, rng.select(slice(None)))
    twice = results(
        case.noise.repeat(2), *(t.repeat_interleave(2, 0) for t in (y, case.mean)), rng.select(torch.tensor([0, 0, 1, 1]))
    )
    for expected, first, second, joined, doubled in zip(whole, *alone, collated, twice, strict=True):
        for got in (torch.cat([first, second]), joined, doubled[::2], doubled[1::2]):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def check_dtype(case: NoiseCase) -> None:
    y, v = data(case), torch.cos(case.mean)
    low, mean = case.noise.to(torch.float32), case.mean.float()
    assert low.log_prob(y.float(), mean).dtype == torch.float64
    pairs = [
        (low.score(y.float(), mean), case.noise.score(y, case.mean)),
        (low.precision(mean)(v.float()), case.noise.precision(case.mean)(v)),
    ]
    for got, expected in pairs:
        assert got.dtype == torch.float32
        assert float((got - expected).norm() / expected.norm()) <= 1e-4
    torch.testing.assert_close(low.log_prob(y.float(), mean), case.noise.log_prob(y, case.mean), rtol=1e-4, atol=1e-3)
    for drawn in (low.sample(mean, Rng([1, 2])), low.perturb(mean, Rng([1, 2]))):
        assert drawn.dtype == torch.float32


def check_split(case: NoiseCase, share: float) -> None:
    """Each half has the law it declares, with the same mean, and the two are uncorrelated along random directions."""
    for row, rng in rows(case, DRAWS):
        y = row.noise.sample(row.mean, rng)
        scores = []
        for half, noise in row.noise.split(y, rng, share=share):
            scores.append(noise.score(half, row.mean).flatten(1))
            assert z_of_mean(scores[-1]) <= Z
            assert z_of_covariance(scores[-1], dense(noise.precision(row.mean[:1]), row.mean[:1])) <= Z
        first, second = scores
        mixing = torch.cos(torch.arange(first.shape[1], dtype=first.dtype)[:, None] * torch.arange(12) + 0.3)
        assert z_of_mean(torch.cat([first * second, (first @ mixing) * (second @ mixing)], 1)) <= Z


def test_every_registered_noise_has_a_case() -> None:
    assert set(CASES) == set(registered("noise", "diffinv.noise"))


def test_score_is_the_gradient_of_log_prob(case: NoiseCase) -> None:
    check_score_is_gradient(case)


def test_score_has_mean_zero_and_covariance_precision(case: NoiseCase) -> None:
    check_score_moments(case)


def test_precision_is_symmetric_and_positive_semidefinite(case: NoiseCase) -> None:
    check_precision_is_symmetric(case)


def test_perturb_has_covariance_precision(case: NoiseCase) -> None:
    check_perturb(case)


def test_variance_is_that_of_the_samples(case: NoiseCase) -> None:
    check_variance(case)


@pytest.mark.parametrize("name", CASES)
def test_nothing_under_the_mask_counts(name: str) -> None:
    check_mask(CASES[name]())


def test_a_row_alone_equals_the_row_in_a_batch(case: NoiseCase) -> None:
    check_rows_are_independent(case)


def test_the_dtype_of_the_mean_is_kept(case: NoiseCase) -> None:
    check_dtype(case)


def test_a_dictionary_restores_the_noise(case: NoiseCase) -> None:
    y = data(case)
    assert torch.equal(from_dict(to_dict(case.noise)).log_prob(y, case.mean), case.noise.log_prob(y, case.mean))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_split_gives_independent_data_of_the_declared_laws(case: NoiseCase, share: float) -> None:
    if case.splits:
        check_split(case, share)
    else:
        with pytest.raises(UnsupportedError, match="independent exposures"):
            case.noise.split(data(case), Rng([1, 2]), share=share)


def test_gradients_reach_the_parameters(case: NoiseCase) -> None:
    """∂ log p towards a common factor of every float field equals a central difference."""
    y = data(case)

    def value(factor: Tensor) -> Tensor:
        scaled = case.noise.map(lambda t: t * factor if t.is_floating_point() else t)
        return scaled.log_prob(y, case.mean).sum()

    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(factor), factor)
    step = 1e-5
    with torch.no_grad():
        difference = (value(factor + step) - value(factor - step)) / (2 * step)
    assert float(abs(gradient - difference)) <= 1e-5 * max(1.0, float(abs(difference)))


@dataclass(frozen=True, eq=False)
class StdForVariance(Gaussian):
    def information(self, mean: Tensor) -> Tensor:
        return 1 / self.at(self.std, mean)


@dataclass(frozen=True, eq=False)
class MaskForgotten(Gaussian):
    def _keep(self, values: Tensor, other: float) -> Tensor:
        return values


@dataclass(frozen=True, eq=False)
class VarianceSlopeForgotten(HeteroscedasticGaussian):
    def derivative(self, y: Tensor, mean: Tensor) -> Tensor:
        return (y - mean) / self.spread(mean)


@dataclass(frozen=True, eq=False)
class SameSignSplit(Gaussian):
    def split(self, y: Tensor, rng: Rng, *, share: float = 0.5):
        (first, noise), (second, other) = super().split(y, rng, share=share)
        return (first, noise), (2 * y - second, other)


@dataclass(frozen=True, eq=False)
class PrecisionForCovariance(Gaussian):
    def perturb(self, mean: Tensor, rng: Rng) -> Tensor:
        return self.information(mean) * rng.normal(mean)


@dataclass(frozen=True, eq=False)
class MeanOverBatch(Gaussian):
    def precision(self, mean: Tensor) -> Diagonal:
        return Diagonal(super().precision(mean).d.mean(0, keepdim=True))


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (StdForVariance, check_score_moments),
        (MaskForgotten, check_mask),
        (SameSignSplit, lambda case: check_split(case, 0.5)),
        (PrecisionForCovariance, check_perturb),
        (MeanOverBatch, check_rows_are_independent),
    ],
)
def test_a_broken_gaussian_fails_its_contract(mutant: type[Gaussian], check) -> None:
    case = CASES["gaussian"]()
    check(case)
    broken = replace(case, noise=mutant(case.noise.std, case.noise.mask))
    with pytest.raises(AssertionError):
        check(broken)


@pytest.mark.parametrize("check", [check_score_is_gradient, check_score_moments])
def test_a_score_without_the_slope_of_the_variance_fails_its_contract(check) -> None:
    case = NoiseCase(VarianceSlopeForgotten(two(2, 5), two(0.6, 1.5), two(0.1, 0.2)), ramp(0.5, 4))
    with pytest.raises(AssertionError):
        check(case)
