"""Checks without truth: against the data, against held-out data, against a score; in closed form and with what each misses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError, UnsupportedError
from diffinv.core.linalg import dense
from diffinv.core.rng import Rng
from diffinv.likelihood import Flat, Joint, Likelihood, Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.noise.poisson import Poisson
from diffinv.operators.algebra import Identity
from diffinv.operators.convolution import PeriodicConvolution
from diffinv.priors.analytic import GaussianPrior
from diffinv.uncertainty.held_out import held_out_pit, held_out_tables, split_observation
from diffinv.uncertainty.predictive import predictive_chi2, predictive_table, reduced_chi2, replicated
from diffinv.uncertainty.stein import posterior_score, stein, stein_kernel, stein_test

SHAPE, STD = (1, 6, 6), 0.3
OBJECTS, DRAWS = 40, 39


def normal(seed: int, *shape: int) -> Tensor:
    return Rng([seed]).normal(torch.empty(1, *shape, dtype=torch.float64))[0]


def prior() -> GaussianPrior:
    axis = torch.arange(6, dtype=torch.float64)
    line = torch.exp(-((axis[:, None] - axis) ** 2) / 4)
    return GaussianPrior(torch.zeros(1, *SHAPE, dtype=torch.float64), torch.kron(line, line) + 1e-3 * torch.eye(36))


def blur() -> PeriodicConvolution:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64)
    return PeriodicConvolution((kernel / 16)[None, None], 1, (6, 6))


def observed(truth: Tensor, std: float = STD, assumed: float = STD) -> Observation:
    y = blur()(truth) + std * normal(31, *truth.shape)
    return Observation(y, blur(), Gaussian(torch.tensor([assumed], dtype=torch.float64)))


def truths() -> Tensor:
    return prior().sample(torch.empty(OBJECTS, *SHAPE, dtype=torch.float64), Rng(range(OBJECTS)))


def exact(data: Observation, std: float, draws: int = DRAWS) -> Tensor:
    """Draws of the dense posterior of `GaussianPrior.posterior`: (N, M, *image)."""
    matrix = dense(blur().apply, torch.zeros(1, *SHAPE, dtype=torch.float64))
    mean, covariance = prior().posterior(matrix, data.y.flatten(1), torch.tensor(std**2, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    return mean[:, None] + (normal(32, len(data.y), draws, 36) @ root.T).unflatten(2, SHAPE)


def test_chi2_of_a_draw_is_about_one_and_that_of_the_mean_below() -> None:
    data = observed(truths())
    samples = exact(data, STD)
    each = torch.stack([reduced_chi2(data, samples[:, m]) for m in range(DRAWS)], 1)
    assert float(each.mean()) == pytest.approx(1, abs=4.5 * (2 / (36 * OBJECTS)) ** 0.5)
    assert float(reduced_chi2(data, samples.mean(1)).mean()) < 0.9
    found = predictive_chi2(data, samples, Rng([1]))
    assert len(found) == OBJECTS + 1 and found[-1].p_value > 0.01
    assert sum(f.fires() for f in found) <= 7


@pytest.mark.parametrize(("std", "assumed"), [(1.25 * STD, STD), (STD, 1.25 * STD)])
def test_chi2_catches_a_wrong_noise(std: float, assumed: float) -> None:
    data = observed(truths(), std, assumed)
    assert predictive_chi2(data, exact(data, assumed), Rng([1]))[-1].p_value < 0.01


def test_chi2_catches_draws_of_the_prior_on_a_single_object() -> None:
    data = observed(truths()).select([0])
    found = predictive_chi2(data, prior().sample(torch.empty(9, *SHAPE), Rng(range(9)))[None].double(), Rng([1]))
    assert len(found) == 1 and found[0].p_value < 0.005


def test_replicates_are_data_of_every_part() -> None:
    x = truths()
    counts = Observation((100 + x).round(), Identity(SHAPE), Poisson(torch.ones(1), torch.full((1,), 100.0)))
    both = Joint((observed(x), counts))
    again = replicated(both, x, Rng(range(OBJECTS)))
    assert float(reduced_chi2(again, x).mean()) == pytest.approx(1, abs=0.15)
    assert not torch.equal(again.parts[0].y, both.parts[0].y) and not torch.equal(again.parts[1].y, both.parts[1].y)
    with pytest.raises(UnsupportedError, match="no data"):
        replicated(Flat(SHAPE), x, Rng(range(OBJECTS)))
    with pytest.raises(DiffinvError, match="as many of both"):
        predictive_table(observed(x), x[:3, None], Rng([0]))


def held_out(std: float, sampler) -> tuple[Observation, Tensor]:
    data = observed(truths(), std)
    seen, held = split_observation(data, Rng(range(OBJECTS)), share=0.5)
    return held, sampler(seen)


HALF = STD * 2**0.5
SAMPLERS = {
    "exact": lambda seen: exact(seen, HALF),
    "narrow": lambda seen: exact(seen, HALF).mean(1, keepdim=True) + 0.05 * (exact(seen, HALF) - exact(seen, HALF).mean(1, True)),
    "biased": lambda seen: exact(seen, HALF) + 0.3,
    "prior": lambda seen: (
        prior().sample(torch.empty(OBJECTS * DRAWS, *SHAPE), Rng(range(OBJECTS * DRAWS))).unflatten(0, (OBJECTS, -1))
    ),
}


@pytest.mark.parametrize(("sampler", "std", "caught"), [("exact", 1.0, False), ("exact", 1.3, True), ("biased", 1.0, True)])
def test_held_out_data_tell_good_draws_from_bad(sampler: str, std: float, caught: bool) -> None:
    held, samples = held_out(std * STD, SAMPLERS[sampler])
    found = held_out_pit(held, samples, Rng([3]))
    assert len(found) == 2 * OBJECTS + 2
    p = min(f.p_value for f in found[-2:])
    assert p < 0.01 if caught else p > 0.01


def test_held_out_data_catch_overconfident_draws() -> None:
    """Draws of almost no width: only visible where the posterior is not narrow beside the noise."""
    held, samples = held_out(STD, SAMPLERS["narrow"])
    assert held_out_pit(held, samples, Rng([3]))[-1].p_value < 0.01


def test_pixels_of_one_object_are_not_independent_data() -> None:
    """The textbook null of Cramér–von Mises (95 % below 0.461) would fire on most calibrated objects: draws share their error."""
    held, samples = held_out(STD, SAMPLERS["prior"])
    smooth = replace(held, y=held.operator(samples[:, 0]) + HALF * normal(40, OBJECTS, *SHAPE))
    table, _ = held_out_tables(smooth, samples[:, 1:], Rng([4]))
    assert float((table[:, 0] > 0.461).double().mean()) > 0.4
    assert min(f.p_value for f in held_out_pit(smooth, samples[:, 1:], Rng([4]))[-2:]) > 0.01


def test_masked_data_have_no_pit() -> None:
    held, samples = held_out(STD, SAMPLERS["exact"])
    mask = torch.ones(1, *SHAPE, dtype=torch.bool)
    mask[..., :2] = False
    hidden = replace(held, noise=replace(held.noise, mask=mask))
    wild = replace(hidden, y=torch.where(mask, held.y, 1e6))
    for table in held_out_tables(wild, samples, Rng([4])):
        assert bool(table.isfinite().all()) and float(table[:, 0].mean()) < 2 * float(table[:, 1:].mean())


def test_the_kernel_is_the_stein_operator_twice() -> None:
    """h(x, x') = sᵀs' k + s·∇'k + s'·∇k + tr ∇∇'k, derivatives by autograd."""
    x, score = normal(50, 5, 3), normal(51, 5, 3)
    square = torch.cdist(x, x) ** 2
    length = square[~torch.eye(5, dtype=torch.bool)].median()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (1 + (a - b).pow(2).sum() / length) ** -0.5

    first, second = torch.func.grad(kernel, 0), torch.func.grad(kernel, 1)
    trace = torch.func.jacrev(first, 1)
    for i, j in ((0, 1), (3, 2), (4, 0)):
        a, b, s, t = x[i], x[j], score[i], score[j]
        expected = s @ t * kernel(a, b) + s @ second(a, b) + t @ first(a, b) + trace(a, b).trace()
        torch.testing.assert_close(stein_kernel(x, score)[i, j], expected)
    assert stein_kernel(x, score).diagonal().abs().max() == 0
    with pytest.raises(ShapeError, match="one score a draw"):
        stein_kernel(x, score[:4])


def scored(data: Likelihood, x: Tensor) -> Tensor:
    """Scores of draws (N, M, *image)."""
    rows = x.flatten(0, 1)
    score = posterior_score(prior(), data.repeat(x.shape[1]), rows, torch.full((len(rows),), 1e-3, dtype=torch.float64))
    return score.unflatten(0, x.shape[:2])


@pytest.mark.parametrize(("scale", "shift", "caught"), [(1.0, 0.0, False), (0.6, 0.0, True), (1.0, 0.25, True)])
def test_the_score_tells_exact_draws_from_others(scale: float, shift: float, caught: bool) -> None:
    """Of 40 calibrated objects more than seven at p ≤ 0.05 have a probability of 0.0005."""
    data = observed(truths())
    x = exact(data, STD, 100)
    mean = x.mean(1, keepdim=True)
    x = mean + scale * (x - mean) + shift
    fires = int((stein_test(x.flatten(2), scored(data, x).flatten(2), Rng([5])).p_value <= 0.05).sum())
    assert fires >= 20 if caught else fires <= 7
    assert stein(x[0], scored(data, x)[0], Rng([5])).draws == 100


def test_the_score_does_not_know_that_its_likelihood_is_wrong() -> None:
    """What it cannot catch: noise twice as large as assumed, draws and score of the same wrong posterior."""
    data = observed(truths(), 2 * STD)
    x = exact(data, STD, 100)
    assert int((stein_test(x.flatten(2), scored(data, x).flatten(2), Rng([5])).p_value <= 0.05).sum()) <= 7
