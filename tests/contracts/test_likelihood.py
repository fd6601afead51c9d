"""What every likelihood promises: its score, its Fisher information, and the sum of parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffinv.core.batched import collate
from diffinv.core.checks import ShapeError
from diffinv.core.linalg import dense
from diffinv.core.rng import Rng
from diffinv.core.types import Shape
from diffinv.likelihood import Flat, Joint, Likelihood, Observation
from diffinv.noise.base import Noise
from diffinv.operators.base import LinearOperator, Operator
from tests.cases import noise as noises

SHAPE = (1, 3, 3)
DRAWS = 8000
Z = 4.5


@dataclass(frozen=True, eq=False)
class Matrix(LinearOperator):
    """A dense map, (1|B, m, n), onto the data's grid."""

    matrix: Tensor
    in_shape: Shape = SHAPE
    out_shape: Shape = noises.SHAPE

    def apply(self, x: Tensor) -> Tensor:
        matrix = self.matrix.expand(x.shape[0], -1, -1)
        return torch.einsum("bmn,bn->bm", matrix, x.flatten(1)).reshape(-1, *self.out_shape)


@dataclass(frozen=True, eq=False)
class Bent(Operator):
    """Matrix x + sin(Matrix x)/2: non-linear, its Jacobian by automatic differentiation."""

    base: Matrix

    @property
    def in_shape(self) -> Shape:
        return self.base.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.base.out_shape

    def apply(self, x: Tensor) -> Tensor:
        mean = self.base.apply(x)
        return mean + torch.sin(mean) / 2


def images() -> Tensor:
    return 1 + torch.sin(torch.arange(18, dtype=torch.float64)).reshape(2, *SHAPE) / 2


def linear() -> Matrix:
    return Matrix(torch.cos(torch.arange(2 * 24 * 9, dtype=torch.float64) ** 1.5).reshape(2, 24, 9).abs() / 4)


def observe(operator: Operator, noise: Noise) -> Observation:
    return Observation(noise.sample(operator(images()), Rng([3, 4])), operator, noise)


def observation(name: str, operator: Operator) -> Observation:
    return observe(operator, noises.CASES[name]().noise)


OPERATORS: dict[str, Callable[[], Operator]] = {"linear": linear, "bent": lambda: Bent(linear())}
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    f"{name}, {kind}": (lambda name=name, make=make: observation(name, make()))
    for name in noises.CASES
    for kind, make in OPERATORS.items()
}
LIKELIHOODS["joint"] = lambda: Joint((observation("gaussian", linear()), observation("poisson", Bent(linear()))))
LIKELIHOODS["flat"] = lambda: Flat(SHAPE)


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request: pytest.FixtureRequest) -> Likelihood:
    return LIKELIHOODS[request.param]()


def check_score_is_gradient(likelihood: Likelihood) -> None:
    x = images().requires_grad_()
    value = likelihood.log_prob(x)
    gradient = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)
    score = likelihood.score(images())
    assert float((gradient - score).abs().max()) <= 1e-8 * float(score.abs().max())


def check_fisher_is_symmetric(likelihood: Likelihood) -> None:
    for i in (0, 1):
        x = images()[i : i + 1]
        matrix = dense(likelihood.select([i]).fisher(x), x)
        scale = float(matrix.abs().max())
        assert float((matrix - matrix.mT).abs().max()) <= 1e-9 * scale
        assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-9 * scale


def check_moments(draws: Tensor, covariance: Tensor) -> None:
    """(N, n) draws have mean zero and the covariance, along the axes and 12 other directions."""
    n = draws.shape[1]
    mixing = torch.cos(torch.arange(12, dtype=draws.dtype)[:, None] * torch.arange(n, dtype=draws.dtype) + 0.3)
    directions = torch.cat([torch.eye(n, dtype=draws.dtype), mixing])
    t = draws @ directions.mT
    expected = torch.einsum("mi,ij,mj->m", directions, covariance, directions)
    for values in (t, t**2 - expected):
        error = values.std(0) / math.sqrt(values.shape[0])
        assert bool((values.mean(0).abs() <= Z * error).all())


def check_perturb(likelihood: Likelihood) -> None:
    for i in (0, 1):
        x = images()[i : i + 1]
        one = likelihood.select([i])
        draws = one.perturb(x.expand(DRAWS, *SHAPE), Rng.for_draws(7, [i], DRAWS)).flatten(1)
        check_moments(draws, dense(one.fisher(x), x))


def check_joint(joint: Joint) -> None:
    """A joint likelihood is the sum of its parts in all three."""
    x = images()
    for method in (lambda p: p.log_prob(x), lambda p: p.score(x), lambda p: p.fisher(x)(x)):
        torch.testing.assert_close(method(joint), sum(method(part) for part in joint.parts), rtol=1e-12, atol=1e-12)


def test_score_is_the_gradient_of_log_prob(likelihood: Likelihood) -> None:
    check_score_is_gradient(likelihood)


def test_fisher_is_symmetric_and_positive_semidefinite(likelihood: Likelihood) -> None:
    check_fisher_is_symmetric(likelihood)


def test_perturb_has_covariance_fisher(likelihood: Likelihood) -> None:
    check_perturb(likelihood)


def test_the_score_at_the_truth_has_covariance_fisher() -> None:
    for operator in (linear(), Bent(linear())):
        noise = noises.CASES["poisson"]().noise.select([0])
        one, x = operator.select([0]), images()[:1]
        mean = one(x).expand(DRAWS, *noises.SHAPE)
        seen = Observation(noise.sample(mean, Rng.for_draws(1, [0], DRAWS)), one, noise)
        check_moments(seen.score(x.expand(DRAWS, *SHAPE)).flatten(1), dense(seen.fisher(x), x))


def test_joint_is_the_sum_of_its_parts() -> None:
    check_joint(LIKELIHOODS["joint"]())


def test_flat_adds_nothing_to_a_joint() -> None:
    one, x = observation("gaussian", linear()), images()
    both = Joint((one, Flat(SHAPE)))
    assert torch.equal(both.log_prob(x), one.log_prob(x))
    assert torch.equal(both.fisher(x)(x), one.fisher(x)(x))


def test_a_row_alone_equals_the_row_in_a_batch(likelihood: Likelihood) -> None:
    x = images()
    singles = [likelihood.select([i]) for i in (0, 1)]
    for method in (lambda p, x: p.log_prob(x), lambda p, x: p.score(x), lambda p, x: p.fisher(x)(x)):
        whole = method(likelihood, x)
        alone = torch.cat([method(one, x[i : i + 1]) for i, one in enumerate(singles)])
        for got in (alone, method(collate(singles), x), method(likelihood.repeat(2), x.repeat_interleave(2, 0))[::2]):
            torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-11)


def test_the_residual_is_zero_where_masked_and_white_elsewhere() -> None:
    noise = noises.CASES["gaussian"]().noise.select([0])
    mean = linear().select([0])(images()[:1]).expand(DRAWS, *noises.SHAPE)
    y = torch.where(noise.mask, noise.sample(mean, Rng.for_draws(1, [0], DRAWS)), torch.nan)
    (residual,) = Observation(y, linear().select([0]), noise).residuals(images()[:1].expand(DRAWS, *SHAPE))
    good = noise.mask[0]
    assert bool((residual[:, ~good] == 0).all())
    square = (residual[:, good] ** 2).mean(0)
    assert float((square - 1).abs().max()) <= Z * math.sqrt(2 / DRAWS)


def test_the_good_data_are_counted_a_row() -> None:
    (count,) = observation("gaussian", linear()).good()
    assert count.tolist() == [21, 23]


def test_a_scaled_likelihood_is_the_same_function_of_the_image(likelihood: Likelihood) -> None:
    scale = torch.tensor([3.0, 0.2], dtype=torch.float64)
    by_row = scale[:, None, None, None]
    scaled, x = likelihood.scaled(scale), images()
    torch.testing.assert_close(scaled.log_prob(x / by_row), likelihood.log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scaled.score(x / by_row), likelihood.score(x) * by_row, rtol=1e-8, atol=1e-10)


def test_data_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"expects \(B, 2, 3, 4\)"):
        Observation(torch.zeros(2, 2, 3, 5), linear(), noises.CASES["gaussian"]().noise)


def test_parts_on_different_grids_are_refused() -> None:
    with pytest.raises(ShapeError, match="one grid"):
        Joint((Flat((1, 3, 3)), Flat((1, 3, 4))))


@dataclass(frozen=True, eq=False)
class JacobianForgotten(Observation):
    def score(self, x: Tensor) -> Tensor:
        return self.operator.base.adjoint(self.noise.score(self.y, self.operator(x)))


@dataclass(frozen=True, eq=False)
class PrecisionTwice(Observation):
    def perturb(self, x: Tensor, rng: Rng) -> Tensor:
        mean = self.operator(x)
        return self.operator.linearize(x).adjoint(self.noise.precision(mean)(self.noise.perturb(mean, rng)))


@dataclass(frozen=True, eq=False)
class LopsidedFisher(Observation):
    def fisher(self, x: Tensor) -> LinearOperator:
        return Matrix(torch.ones(1, 9, 9, dtype=x.dtype).triu(), SHAPE, SHAPE)


@dataclass(frozen=True, eq=False)
class MeanOfParts(Joint):
    def score(self, x: Tensor) -> Tensor:
        return super().score(x) / len(self.parts)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (JacobianForgotten, check_score_is_gradient),
        (PrecisionTwice, check_perturb),
        (LopsidedFisher, check_fisher_is_symmetric),
    ],
)
def test_a_broken_observation_fails_its_contract(mutant: type[Observation], check) -> None:
    sound = observation("gaussian", Bent(linear()))
    check(sound)
    with pytest.raises(AssertionError):
        check(mutant(sound.y, sound.operator, sound.noise))


@pytest.mark.parametrize("check", [check_joint, check_score_is_gradient])
def test_a_joint_that_averages_fails_its_contract(check) -> None:
    with pytest.raises(AssertionError):
        check(MeanOfParts(LIKELIHOODS["joint"]().parts))
